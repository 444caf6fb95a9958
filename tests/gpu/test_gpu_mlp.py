"""The MLP's and the norm's kernels on a GPU, against fp64, with outputs poisoned by NaN; and a whole MLP on each
backend. These tests have not run so far."""

import contracts
import pytest
import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty

from fastlora.functional import Adapter, GroupLayer, lora_mlp
from fastlora.ops.mlp import aten as mlp_aten

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGE, ODD, ROW = (2048, 5632), (777, 1001), (1, 4096)  # M, K
CASES = [("silu", BF16, BF16, size, 16, 0.1) for size in (LARGE, ODD, ROW)]
CASES += [(activation, BF16, FP32, LARGE, 64, 0.0) for activation in ("gelu", "gelu_tanh", "relu")]
CASES += [("silu", FP16, FP16, ODD, 16, 0.0), ("gelu", FP32, FP32, ODD, 16, 0.1), ("silu", FP32, FP32, ODD, 8, 0.0)]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(shape, device="cuda", generator=generator) * scale).to(dtype)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return poisoned_empty(*shape, dtype=dtype, device="cuda", layout="offset")


def workspace(size: int) -> torch.Tensor | None:
    return torch.full((size,), float("nan"), device="cuda") if size else None


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_activation_and_its_gradients(case, gated):
    from fastlora.kernels import mlp
    from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale

    activation, dtype, adapter_dtype, (m, k), r, p = case
    gate, dh, ds = normal(m, k, dtype=dtype), normal(m, k, dtype=dtype, scale=0.5), normal(m, r, dtype=dtype)
    up = normal(k, m, dtype=dtype).t().contiguous() if gated else None
    a = normal(r, k, dtype=adapter_dtype, scale=k**-0.5)
    seed = torch.tensor([4711], device="cuda")
    dropout = {"seed": seed, "dropout_p": p} if p else {}
    keep = reference_keep_mask(seed, m, k, p) * threshold_and_scale(p)[1] if p else torch.ones(m, k, device="cuda")
    got = {"h": empty(m, k, dtype=dtype), "S": empty(m, r, dtype=dtype)}
    mlp.activate(gate, up, activation, got["h"], a, got["S"], workspace(mlp.activate_workspace(gate, a)), **dropout)
    got |= {"dgate": empty(m, k, dtype=dtype), "dA": empty(r, k, dtype=adapter_dtype)}
    if gated:
        got["dup"] = empty(m, k, dtype=dtype)
    space = workspace(mlp.activate_backward_workspace(gate, r))
    mlp.activate_backward(dh, ds, gate, up, activation, a, got["dgate"], got.get("dup"), got["dA"], space, **dropout)

    def eager(of: torch.dtype) -> dict[str, torch.Tensor]:
        inputs = [t.to(of).requires_grad_() for t in (gate, up) if t is not None]
        value = mlp_aten.ACTIVATIONS[activation].value(inputs[0])
        h = value if up is None else value * inputs[1]
        cast, mask = a.to(dtype).to(of), keep.to(of)
        grads = torch.autograd.grad(h, inputs, dh.to(of) + (ds.to(of) @ cast) * mask)
        dropped = h.detach() * mask
        found = {"h": h.detach(), "S": dropped @ cast.t(), "dA": ds.to(of).t() @ dropped}
        return found | dict(zip(("dgate", "dup"), grads, strict=False))

    exact, near = eager(torch.float64), eager(dtype)
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], near[name].to(value.dtype), name)
        assert_surroundings_untouched(value)


def test_an_mlp(kernel_backend):
    """Without dropout the fused forms give what plain ATen gives, to rounding, and the same bits on every run."""
    layers = [
        GroupLayer(
            normal(n, k, dtype=BF16, scale=k**-0.5),
            [
                Adapter(
                    normal(16, k, dtype=FP32, scale=k**-0.5).requires_grad_(),
                    normal(n, 16, dtype=FP32, scale=0.25).requires_grad_(),
                    2.0,
                )
            ],
        )
        for n, k in ((2816, 1024), (2816, 1024), (1024, 2816))
    ]
    x = normal(2, 500, 1024, dtype=BF16).requires_grad_()
    leaves = [x, *(t for layer in layers for t in layer.adapters[0][:2])]

    def step(backend: str) -> list[torch.Tensor]:
        y = lora_mlp(x, *layers, "silu", backend=backend)
        loss = y.float().square().mean()
        return [y.detach(), *torch.autograd.grad(loss, leaves)]

    first, second, plain = step(kernel_backend), step(kernel_backend), step("torch")
    for one, other, want in zip(first, second, plain, strict=True):
        assert torch.equal(one, other)
        assert (one.double() - want.double()).norm() <= 2e-2 * want.double().norm()


class TestMlp(contracts.Mlp):
    places = contracts.ON_A_GPU
    dtypes = ((FP32, FP32),)  # of half precision the kernels by themselves, and as near as ATen
    self_checks = tuple(((dtype, FP32), dropout) for dtype in (BF16, FP32) for dropout in (False, True))
    sizes = {  # noqa: RUF012
        "silu": {"activation": "silu", "gated": True, "shape": (2, 500), "k": 1024, "n": 2816, "out": 1024, "r": 16},
        "gelu, plain": {"activation": "gelu", "gated": False, "shape": (333,), "k": 1000, "n": 1001, "out": 500},
    }
