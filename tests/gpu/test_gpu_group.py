# pyright: reportArgumentType=false

"""Groups of layers on a GPU: `lora_group` against fp64 and against the layers one by one. Never run so far."""

import pytest
import torch
from numerics import assert_close_to_fp64

from fastlora.functional import Adapter, GroupLayer, lora_group, multi_lora_linear
from fastlora.ops.group import group as group_op
from fastlora.ops.group import triton as group_triton

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = {
    "qkv": ((4096, 1024, 1024), (16, 16, 16)),
    "gate and up": ((1000, 1000), (8, 64)),
    "five": ((64,) * 5, (4,) * 5),
}


def make(name, dtype, adapter_dtype, p, k=1000):
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape, scale=1.0, to=dtype):
        return (torch.randn(shape, device="cuda", generator=generator) * scale).to(to)

    x = randn(777, k).requires_grad_()
    layers = []
    for n, r in zip(*SIZES[name], strict=True):
        a = randn(r, k, scale=k**-0.5, to=adapter_dtype).requires_grad_()
        b = randn(n, r, scale=r**-0.5, to=adapter_dtype).requires_grad_()
        layers.append(GroupLayer(randn(n, k, scale=k**-0.5), [Adapter(a, b, 1.5, p)], randn(n)))
    return x, layers, [randn(777, n) for n in SIZES[name][0]]


def run(function, x, layers, dys, **options):
    torch.manual_seed(0)
    ys = function(x, layers, **options)
    leaves = [x, *(t for layer in layers for t in layer.adapters[0][:2])]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def one_by_one(x, layers, **options):
    return [multi_lora_linear(x, layer.weight, layer.adapters, layer.bias, **options) for layer in layers]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
def test_against_fp64(name, dtype, adapter_dtype, kernel_backend):
    x, layers, dys = make(name, dtype, adapter_dtype, 0.0)
    got = run(lora_group, x, layers, dys, backend=kernel_backend)

    def convert(to):
        change = lambda t: t.detach().to(to)  # noqa: E731
        adapters = [layer.adapters[0] for layer in layers]
        changed = [
            GroupLayer(
                change(layer.weight),
                [a._replace(lora_A=change(a.lora_A).requires_grad_(), lora_B=change(a.lora_B).requires_grad_())],
                change(layer.bias),
            )
            for layer, a in zip(layers, adapters, strict=True)
        ]
        return run(one_by_one, change(x).requires_grad_(), changed, [change(dy) for dy in dys], backend="torch")

    for value, exact, eager in zip(got, convert(torch.float64), convert(dtype), strict=True):
        assert_close_to_fp64(value, exact, eager.to(value.dtype))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_same_numbers_as_one_by_one(p, kernel_backend):
    """The masks too: each member draws its seed in the order of the calls."""
    x, layers, dys = make("qkv", FP32, FP32, p)
    together = run(lora_group, x, layers, dys, backend=kernel_backend)
    apart = run(one_by_one, x, layers, dys, backend=kernel_backend)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
def test_the_self_check_passes(dropout, dtype):
    assert group_op.self_check(group_triton, torch.device("cuda"), dtype, FP32, dropout) is None
