# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""The MLP's kernels by themselves, interpreted or on a GPU, against fp64."""

import torch
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout

from fastlora.kernels import mlp
from fastlora.kernels.dropout import reference_keep_mask, threshold_and_scale
from fastlora.ops.mlp import aten as mlp_aten


class Problem:
    def __init__(
        self, m, k, r, dtype=torch.bfloat16, adapter_dtype=None, gated=True, p=0.0, layout="contiguous", device="cpu"
    ):
        torch.manual_seed(m + k + r)

        def randn(rows, columns, of=dtype, scale=1.0):
            return with_layout((torch.randn(rows, columns) * scale).to(device, of), layout)

        self.gate, self.dh, self.ds = randn(m, k, scale=1.5), randn(m, k), randn(m, r)
        self.up = randn(m, k) if gated else None
        self.lora_A = randn(r, k, adapter_dtype or dtype, k**-0.5)
        self.layout, self.dtype, self.p = layout, dtype, p
        seed = torch.tensor([987654321012345], device=device)
        self.dropout = {"seed": seed, "dropout_p": p} if p else {}
        self.keep = reference_keep_mask(seed, m, k, p) if p else torch.ones(m, k, dtype=torch.bool, device=device)
        self.scale = threshold_and_scale(p)[1] if p else 1.0

    def empty(self, *shape, dtype=None):
        return poisoned_empty(*shape, dtype=dtype or self.dtype, device=self.gate.device.type, layout=self.layout)

    def workspace(self, size):
        return torch.full((size,), float("nan"), device=self.gate.device) if size else None

    def wanted(self, activation, dtype):
        """h, S, dgate, dup, dA as eager PyTorch makes them in `dtype`."""
        gate, dh, ds, a = (t.to(dtype) for t in (self.gate, self.dh, self.ds, self.lora_A.to(self.dtype)))
        up = None if self.up is None else self.up.to(dtype)
        inputs = [t.clone().requires_grad_() for t in (gate, up) if t is not None]
        value = mlp_aten.ACTIVATIONS[activation].value(inputs[0])
        h = value if up is None else value * inputs[1]
        dropped = h.detach() * self.keep
        grads = torch.autograd.grad(h, inputs, dh + (ds @ a) * self.scale * self.keep)
        found = {"h": h.detach(), "S": dropped @ a.t() * self.scale, "dgate": grads[0]}
        found["dA"] = (ds.t() @ dropped) * self.scale
        return found | ({"dup": grads[1]} if len(grads) > 1 else {})


def check(problem, activation, in_place=False):
    p = problem
    gate, up, a = p.gate, p.up, p.lora_A
    workspace = p.workspace(mlp.activate_workspace(gate, a))
    got = {"h": p.empty(*gate.shape), "S": p.empty(*p.ds.shape)}
    mlp.activate(gate, up, activation, got["h"], a, got["S"], workspace, **p.dropout)
    dh = p.dh.clone() if in_place else p.dh
    got["dgate"] = dh if in_place else p.empty(*gate.shape)
    got["dA"] = p.empty(*a.shape, dtype=a.dtype)
    if up is not None:
        got["dup"] = p.empty(*gate.shape)
    workspace = p.workspace(mlp.activate_backward_workspace(gate, a.shape[0]))
    mlp.activate_backward(
        dh, p.ds, gate, up, activation, a, got["dgate"], got.get("dup"), got["dA"], workspace, **p.dropout
    )
    exact, eager = p.wanted(activation, torch.float64), p.wanted(activation, p.dtype)
    for name, value in got.items():
        assert_close_to_fp64(value, exact[name], eager[name].to(value.dtype), name)
        if p.layout != "contiguous":
            assert_surroundings_untouched(value)
    return got
