# pyright: reportArgumentType=false

"""Groups of layers on a GPU: `lora_group` against fp64 and against the layers one by one. Never run so far."""

import contracts
import pytest
import torch

from fastlora.functional import Adapter, GroupLayer, lora_group, multi_lora_linear

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


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_same_numbers_as_one_by_one(p, kernel_backend):
    """The masks too: each member draws its seed in the order of the calls."""
    x, layers, dys = make("qkv", FP32, FP32, p)
    together = run(lora_group, x, layers, dys, backend=kernel_backend)
    apart = run(one_by_one, x, layers, dys, backend=kernel_backend)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


class TestGroup(contracts.Group):
    places = contracts.ON_A_GPU
    sizes = {  # noqa: RUF012
        "qkv": {"shape": (777,), "k": 1000, "sizes": (4096, 1024, 1024), "ranks": (16, 16, 16)},
        "gate and up": {"shape": (777,), "k": 1000, "sizes": (1000, 1000), "ranks": (8, 64)},
        "five": {"shape": (7, 111), "k": 1000, "sizes": (64,) * 5, "ranks": (4,) * 5},
    }
