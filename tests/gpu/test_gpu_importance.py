"""AdaLoRA's importance kernels on a GPU, against fp64, at a model's sizes. These tests have not run so far."""

import pytest
import torch
from numerics import assert_close_to_fp64

from fastlora.kernels.importance_plan import Averages, Factors, Layout
from fastlora.ops.importance import aten as importance_aten
from fastlora.ops.importance import importance as importance_op

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LLAMA = [(12, 4096, 4096)] * 2 + [(12, 4096, 11008)] * 2 + [(12, 11008, 4096)]
ODD = [(13, 1003, 777), (1, 5, 3), (130, 300, 1003)]


def normal(layout: Layout, dtype: torch.dtype, seed: int) -> Factors:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(factor: str) -> list[torch.Tensor]:
        shapes = [layout.shape(factor, i) for i in range(len(layout.sizes))]
        return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes]

    return Factors(*map(draw, Factors._fields))


@pytest.mark.parametrize("sizes", [LLAMA, ODD], ids=["llama", "odd"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_three_steps(dtype, sizes):
    from fastlora.ops.importance import triton as importance_triton

    layout = Layout(sizes)
    runs = {}
    for name in ("kernels", "again", "torch", "exact"):
        of = torch.float64 if name == "exact" else FP32
        smooth, unsure = (torch.zeros(layout.numel, device="cuda", dtype=of) for _ in range(2))
        update = importance_aten.update if name == "torch" else importance_triton.update
        scores = smooth
        for step in range(3):
            weights, gradients = normal(layout, dtype, step), normal(layout, dtype, 100 + step)
            gradients = gradients._replace(p=[None, *gradients.p[1:]])
            arguments = (Averages(layout, smooth, unsure, 0.85, 0.7), weights, gradients)
            scores = importance_op.reference(*arguments) if name == "exact" else update(*arguments)
        runs[name] = (smooth, unsure, scores)
    columns = (runs[name] for name in ("kernels", "again", "torch", "exact"))
    names = ("sensitivity", "uncertainty", "scores")
    for what, got, again, near, exact in zip(names, *columns, strict=True):
        assert torch.equal(got, again)
        assert_close_to_fp64(got, exact, near, what)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_self_check_passes(dtype, device):
    from fastlora.ops.importance import triton as importance_triton

    assert importance_op.self_check(importance_triton, device, dtype) is None
    assert importance_op.select(normal(Layout(ODD), dtype, 0)) is importance_triton
