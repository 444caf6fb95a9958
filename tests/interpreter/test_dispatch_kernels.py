"""The dispatcher's self-checks and measurements with the real Triton backends, interpreted on the CPU."""

import pytest
import torch

from fastlora.kernels import expand, gemm, launch
from fastlora.ops.lora import choice, cublas, measure, triton_s_inside

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_s_inside_is_checked_by_running_its_own_kernel(dtype, monkeypatch):
    assert choice.self_check(triton_s_inside, CPU, dtype, dtype, False) is None  # type: ignore[arg-type]
    real, launches = gemm.forward_gemm_with_s, []

    def wrong(x, weight, bias, lora_A, lora_B, y, s, scaling):
        real(x, weight, bias, lora_A, lora_B, y, s, scaling)
        launches.append(s.shape)
        s.mul_(-1)  # right in the output, wrong in what backward gets

    monkeypatch.setattr(triton_s_inside, "forward_gemm_with_s", wrong)
    launch.forget_plans()
    failure = choice.self_check(triton_s_inside, CPU, dtype, dtype, False)  # type: ignore[arg-type]
    assert failure is not None and "gradient of lora_B" in failure and len(launches) == 1  # the second pass is a plan's


@pytest.mark.parametrize("dropout", [False, True])
def test_triton_backends_are_measured_by_the_real_passes(dropout):
    key = measure.Key(16, 24, 40, 4, torch.bfloat16, torch.bfloat16, dropout, by_column=dropout)
    names = ["cublas", "triton"] + ["triton_s_inside"] * (not dropout)
    found = measure.measure(key, {name: choice.load(name) for name in names}, CPU)
    assert list(found.forward) == list(found.backward) == names and found.left_out == {}


def test_a_kernel_that_is_wrong_at_size_only_is_left_out(monkeypatch):
    real = expand.expand

    def wrong_where_wide(s, w, out, **how):
        real(s, w, out, **how)
        if out.shape[1] == 40:
            out[-1] = 0.0

    monkeypatch.setattr(cublas, "expand", wrong_where_wide)
    key = measure.Key(16, 24, 40, 4, torch.float32, torch.float32, False)
    found = measure.measure(key, {name: choice.load(name) for name in ("torch", "cublas")}, CPU)
    assert list(found.forward) == ["torch"] and "gradient of x differs" in found.left_out["cublas"]
