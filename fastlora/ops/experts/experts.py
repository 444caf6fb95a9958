"""`lora_grouped_linear`: the linear layer of a mixture's experts, each with its own low-rank adapter.

    y_i = x_i W_eᵀ + b_e + Σ_j s_j·(drop_j(x_i) A_j,eᵀ) B_j,eᵀ        e: the expert of sorted row i
    z_t = Σ_i w_i·y_i over the k rows i of token t                      where routing weights are given

Saved: x in the order in which it came, each adapter's S, and references to W, A, B and the routing: no sorted copy of x
where it is gathered here, no mask, no y, and nothing of the weights' size but the weights. Never made: ΔW of all
experts, dW.

Eager calls and `torch.compile` share one `autograd.Function`, whose passes are library ops while compiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...runtime import env
from ...runtime.trust import Trusted, first_difference, module_or_reason, seeded
from .. import call, reference
from ..call import backward_pass, check_probability, takes_fused_path
from . import aten
from .aten import Needs, Options
from .routing import Routing

WHERE = "lora_grouped_linear"
_trusted = Trusted("the backend for experts", "ATen runs instead")


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    bias: Tensor | None = None,
    is_transposed: bool = False,
    gathered: bool = False,
    dropout_p: float | Sequence[float] = 0.0,
    seed: int | Tensor | None = None,
    combine: Tensor | None = None,
    materialise: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """A mixture's linear layer with low-rank adapters on every expert, for routed tokens sorted by expert.

    Equivalent to, for each sorted row i and its expert e:

        row = x[routing.rows[i]] if gathered else x[i]
        y[i] = row @ weight[e].T + bias[e] + sum(s * (F.dropout(row, p) @ A[e].T) @ B[e].T for A, B, s, p in adapters)
        z[routing.rows[i]] += combine.flatten()[routing.order[i]] * y[i]

    Args:
        x: (T·k, K) in the order of `routing`, or with `gathered` (T, K): no sorted copy of it is then kept.
        weight: (E, N, K), or with `is_transposed` (E, K, N), of x's dtype. bias: (E, N) or None. Both are taken to be
            frozen; where they require a gradient, the dense one is formed.
        routing: who takes which token. Rows that no expert takes are zero, and so are their gradients.
        lora_As: (E, r, K) for each adapter, lora_Bs: (E, N, r), of any strides and of x's or another float dtype;
            PEFT's factors are `lora_A.view(E, r, K)` and `lora_B.view(N, r, E).permute(2, 0, 1)`. scalings: a number
            for each. Without adapters this is the frozen layer.
        dropout_p: the probability, in [0, 1], of dropping an element of a routed row on the low-rank path; a number for
            each adapter or for all. 0 outside training.
        seed: what the masks are made from (adapter j's from seed + j): a number, or an int64 tensor of one element;
            drawn from torch's generator for None.
        combine: (T, k) routing weights of any float dtype: each token's k rows are weighted and summed, in a fixed
            order and rounded once.
        materialise: True: y and dX by W + ΔW, one expert's at a time, rounded to its dtype; dA and dB by the rank-r
            path still. Not with dropout. None: where that is counted to be cheaper, and loses nothing: see
            `is_cheaper_materialised`.
        backend: "auto", "torch", or "triton" or "cublas" (the same here).

    Returns:
        y (T·k, N) in x's dtype, in the order of `routing`; with `combine` z (T, N), in the wider of x's and combine's.
        Differentiable once in x, lora_As, lora_Bs, combine, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a routing of another size, a probability
            outside [0, 1], `materialise` with dropout.

    Examples:
        >>> routing = Routing(torch.randint(8, (32, 2)), num_experts=8)
        >>> x, weight, A, B = torch.randn(32, 64), torch.randn(8, 96, 64), torch.randn(8, 4, 64), torch.zeros(8, 96, 4)
        >>> lora_grouped_linear(x, weight, routing, [A], [B], [2.0], gathered=True).shape
        torch.Size([64, 96])
    """
    ps = tuple(dropout_p) if isinstance(dropout_p, Sequence) else (dropout_p,) * len(lora_As)
    _check(x, weight, routing, lora_As, lora_Bs, scalings, bias, is_transposed, gathered, ps, combine, materialise)
    narrow = call.autocast_enabled(x)
    if narrow:  # the weights are cast an expert at a time
        x = call.cast_for_autocast(x, x, None)[0]
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        call.check_one_dtype(x, weight, bias, WHERE)
    if not takes_fused_path(x, weight, bias, combine, *lora_As, *lora_Bs):
        rows = x.index_select(0, routing.rows) if gathered else x
        frozen = weight.transpose(1, 2) if is_transposed else weight
        y = reference.grouped_lora_linear(rows, frozen, routing.ends, lora_As, lora_Bs, scalings, bias, ps)
        return y if combine is None else aten.combined(y, combine, routing.order)
    compiling = torch.compiler.is_compiling()
    scales, top_k = tuple(map(float, scalings)), routing.top_k
    options = Options(
        scales, ps, top_k, is_transposed, gathered, narrow, bool(materialise), None if compiling else routing
    )
    module = None if compiling else select(x, lora_As, lora_Bs, combine, options, backend)
    if materialise is None and (compiling or module is aten):
        options = options._replace(materialise=is_cheaper_materialised(x, weight, lora_As, lora_Bs, routing, options))
    seeds = _seed(seed, x.device) if any(ps) else None
    arguments = (x, weight, bias, routing.order, routing.offsets, seeds, combine)
    if module is not None and not torch.is_grad_enabled():
        return module.forward(x, weight, bias, lora_As, lora_Bs, *arguments[3:], options)[0]
    return GroupedLinearFunction.apply(*arguments, module, backend, options, *lora_As, *lora_Bs)  # type: ignore[return-value]


def is_cheaper_materialised(
    x: Tensor, weight: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], routing: Routing, options: Options
) -> bool:
    """The default rule where ATen runs: forming W + ΔW takes 2·N·K·r products an expert (in the forward pass and again
    in the backward) and spares r·(N + K) a row. Only in full precision on a CPU: half precision would round away what
    is below W's last digit, and the kernels of a GPU need less than either."""
    if not lora_As or any(options.dropout_ps) or options.narrow or x.is_cuda or x.dtype.itemsize < 4:
        return False
    if any(factor.dtype != x.dtype for factor in (*lora_As, *lora_Bs)):
        return False
    experts, n, k = weight.shape
    return routing.num_rows * (n + k) > 2 * experts * n * k


def select(
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    combine: Tensor | None,
    options: Options,
    backend: str,
) -> ModuleType:
    """ATen on a CPU; on a GPU the kernels, unless they cannot take the call or are wrong on this device."""
    if backend not in env.BACKENDS:
        raise ValueError(f"{WHERE}: backend: got {backend!r}, want one of {', '.join(env.BACKENDS)}")
    asked = env.backend_text() if backend == "auto" else backend
    if asked == "torch" or (not x.is_cuda and asked in ("", "auto")):
        return aten
    module = module_or_reason("fastlora.ops.experts.triton")
    if isinstance(module, str) or module.unsupported(x, lora_As, lora_Bs, options) is not None:
        return aten
    adapter_dtype = call.low_rank_dtype(x, lora_As[0], lora_Bs[0], False) if lora_As else x.dtype
    key = (x.device, x.dtype, adapter_dtype, any(options.dropout_ps), options.narrow, combine is not None)
    if x.is_cuda and _trusted.why_not(key, lambda: self_check(module, *key)) is not None:
        return aten
    return module


def self_check(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    narrow: bool = False,
    weighted: bool = False,
) -> str | None:
    """Compares y, or its weighted sums, and every gradient with fp64 on a small problem: two adapters, an expert
    without rows and rows without an expert; None where they agree, else what differs. The generators' states are left
    as they were."""
    with seeded(device), torch.no_grad():
        n, k, tokens = (392, 264, 301) if device.type == "cuda" else (40, 24, 11)  # more than a tile where it is fast
        experts, ranks, scalings = 5, (10, 24), (1.5, 0.5)
        ps = (0.25, 0.25) if dropout else (0.0, 0.0)

        def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(of)

        index = torch.tensor([0, 1, 3, 4, 5], device=device)[torch.randint(5, (tokens, 2), device=device)]
        routing = Routing(index, experts)
        x, weight, bias = draw(tokens, k), draw(experts, n, k, scale=k**-0.5), draw(experts, n)
        combine = torch.rand(tokens, 2, device=device).to(dtype) if weighted else None
        dy = draw(tokens if weighted else 2 * tokens, n)
        lora_As = [draw(experts, r, k, scale=k**-0.5, of=adapter_dtype) for r in ranks]
        lora_Bs = [draw(experts, n, r, scale=r**-0.5, of=adapter_dtype) for r in ranks]
        options = Options(scalings, ps, 2, False, True, narrow, False)
        seed = torch.randint(2**62, (1,), device=device) if dropout else None
        of = (lora_As, lora_Bs, routing.order, routing.offsets, seed, combine, options)
        y, s = module.forward(x, weight, bias, *of)
        needs = Needs(True, False, False, (True, True), (True, True), weighted)
        dx, _, _, dc, grad_as, grad_bs = module.backward(dy, x, weight, bias, s, *of, needs)
        keeps = [module.keep_mask(seed, i, 2 * tokens, k, p) for i, p in enumerate(ps)]
        leaves = [t.double().requires_grad_() for t in (x, *lora_As, *lora_Bs, *([] if combine is None else [combine]))]
    with torch.inference_mode(False), torch.enable_grad():
        rows, frozen = leaves[0].index_select(0, routing.rows), (weight.double(), routing.ends)
        factors = (leaves[1:3], leaves[3:5], scalings, bias.double(), ps, keeps)
        want = reference.grouped_lora_linear(rows, *frozen, *factors)
        want = aten.combined(want, leaves[5], routing.order) if weighted else want
        expected = [want.detach(), *torch.autograd.grad(want, leaves, dy.double())]
    names = ["output", *(f"gradient of {name}" for name in ("x", "lora_A 0", "lora_A 1", "lora_B 0", "lora_B 1"))]
    names += ["gradient of combine"] * weighted
    got = [t.flatten(0, -2) if t.dim() == 3 else t for t in (y, dx, *grad_as, *grad_bs, dc) if t is not None]
    wanted = [t.flatten(0, -2) if t.dim() == 3 else t for t in expected]
    return first_difference(zip(names, got, wanted, strict=True), dtype)


class GroupedLinearFunction(torch.autograd.Function):
    """y for the sorted rows; `factors` are the A's, then the B's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        order: Tensor,
        offsets: Tensor,
        seed: Tensor | None,
        combine: Tensor | None,
        module: ModuleType | None,
        backend: str,
        options: Options,
        *factors: Tensor,
    ) -> Tensor:
        count = len(factors) // 2
        inputs = (x, weight, bias, factors[:count], factors[count:], order, offsets, seed, combine)
        if module is None:
            y, *s = torch.ops.fastlora.grouped_linear(*inputs, *options[:7], backend)
        else:
            y, s = module.forward(*inputs, options)
        need = ctx.needs_input_grad
        needs_as, needs_bs = any(need[10 : 10 + count]), any(need[10 + count :])
        needs_rows = needs_as or need[1] or need[6] or (needs_bs and options.materialise)
        s, bias = s if needs_bs else [], bias if need[6] else None
        ctx.save_for_backward(x if needs_rows else None, weight, bias, order, offsets, seed, combine, *factors, *s)
        ctx.arguments = (module, backend, options, count, x.dtype)
        return y

    @staticmethod
    @backward_pass
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        module, backend, options, count, dtype = ctx.arguments
        x, weight, bias, order, offsets, seed, combine, *rest = ctx.saved_tensors
        lora_As, lora_Bs, s = rest[:count], rest[count : 2 * count], rest[2 * count :]
        need = ctx.needs_input_grad
        wanted = [*need[:3], need[6], *need[10:]]
        inputs = (dy.to(dtype), x, weight, bias, s, lora_As, lora_Bs, order, offsets, seed, combine)
        if module is None:
            flat = torch.ops.fastlora.grouped_linear_backward(*inputs, *options[:7], wanted, backend)
        else:
            *flat, grad_as, grad_bs = module.backward(*inputs, options, Needs.of(wanted))
            flat += [*grad_as, *grad_bs]
        dx, dw, db, dc, *grads = (grad if want else None for grad, want in zip(flat, wanted, strict=True))
        return (dx, dw, db, None, None, None, dc, None, None, None, *grads)


# What a compiled graph calls: the passes as ops.
_library = torch.library.Library("fastlora", "FRAGMENT")
_OPTIONS = (
    "float[] scalings, float[] dropout_ps, int top_k, bool is_transposed, bool gathered, bool narrow, bool materialise"
)
_TENSORS = "Tensor[] lora_As, Tensor[] lora_Bs, Tensor order, Tensor offsets, Tensor? seed, Tensor? combine"
for _schema in (
    f"grouped_linear(Tensor x, Tensor weight, Tensor? bias, {_TENSORS}, {_OPTIONS}, str backend) -> Tensor[]",
    f"grouped_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor? bias, Tensor[] s, {_TENSORS}, {_OPTIONS}, "
    "bool[] needs, str backend) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _op_forward(x, weight, bias, lora_As, lora_Bs, order, offsets, seed, combine, *options_and_backend):
    options = Options(*options_and_backend[:-1])
    module = select(x, lora_As, lora_Bs, combine, options, options_and_backend[-1])
    y, s = module.forward(x, weight, bias, lora_As, lora_Bs, order, offsets, seed, combine, options)
    return [y, *s]


def _op_forward_fake(x, weight, bias, lora_As, lora_Bs, order, offsets, seed, combine, *options_and_backend):
    options = Options(*options_and_backend[:-1])
    n, num_rows = weight.shape[2 if options.is_transposed else 1], order.shape[0]
    y = x.new_empty(num_rows, n)
    if combine is not None:
        y = x.new_empty(combine.shape[0], n, dtype=torch.promote_types(x.dtype, combine.dtype))
    if options.materialise:
        return [y]
    dtypes = [call.low_rank_dtype(x, a, b, options.narrow) for a, b in zip(lora_As, lora_Bs, strict=True)]
    return [y, *(x.new_empty(num_rows, a.shape[1], dtype=t) for a, t in zip(lora_As, dtypes, strict=True))]


def _op_backward(dy, x, weight, bias, s, lora_As, lora_Bs, order, offsets, seed, combine, *rest):
    *options, needs, backend = rest
    options = Options(*options)
    module = select(dy, lora_As, lora_Bs, combine, options, backend)
    of = (dy, x, weight, bias, s, lora_As, lora_Bs, order, offsets, seed, combine, options)
    *grads, grad_as, grad_bs = module.backward(*of, Needs.of(needs))
    # An op's outputs are not optional, and have the strides that the fake ones promise.
    return [dy.new_empty(0) if grad is None else grad.contiguous() for grad in (*grads, *grad_as, *grad_bs)]


def _op_backward_fake(dy, x, weight, bias, s, lora_As, lora_Bs, order, offsets, seed, combine, *rest):
    *options, needs, _ = rest
    options = Options(*options)
    rows = order.shape[0] // options.top_k if options.gathered else order.shape[0]
    shapes = [(rows, weight.shape[1 if options.is_transposed else 2]), weight.shape, (weight.shape[0], dy.shape[1])]
    weights = dy if combine is None else combine
    shapes += [t.shape for t in (weights, *lora_As, *lora_Bs)]
    likes = (dy, weight, weight, weights, *lora_As, *lora_Bs)
    return [
        dy.new_empty(shape, dtype=like.dtype) if need else dy.new_empty(0)
        for shape, like, need in zip(shapes, likes, needs, strict=True)
    ]


_library.impl("grouped_linear", _op_forward, "CompositeExplicitAutograd")
_library.impl("grouped_linear_backward", _op_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::grouped_linear", _op_forward_fake, lib=_library)
torch.library.register_fake("fastlora::grouped_linear_backward", _op_backward_fake, lib=_library)


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != device:
        raise ValueError(
            f"{WHERE}: seed: got {tuple(seed.shape)} of {seed.dtype} on {seed.device}, want a number, or an int64 "
            f"tensor (1,) on {device}"
        )
    return seed


def _check(
    x, weight, routing, lora_As, lora_Bs, scalings, bias, is_transposed, gathered, ps, combine, materialise
) -> None:
    if not isinstance(routing, Routing):
        raise ValueError(f"{WHERE}: routing: got {type(routing).__name__}, want a Routing")
    if not len(lora_As) == len(lora_Bs) == len(scalings) == len(ps):
        raise ValueError(
            f"{WHERE}: adapters: got {len(lora_As)} lora_As, {len(lora_Bs)} lora_Bs, {len(scalings)} scalings and "
            f"{len(ps)} dropout probabilities, want one of each for every adapter"
        )
    for p in ps:
        check_probability(p, WHERE)
    layout, dims = ("(E, K, N)", (0, 2, 1)) if is_transposed else ("(E, N, K)", (0, 1, 2))
    experts, n, k = [weight.shape[d] for d in dims] if weight.dim() == 3 else (0, 0, 0)
    fits = weight.dim() == 3 and x.dim() == 2 and x.shape[1] == k
    for a, b in zip(lora_As, lora_Bs, strict=True):
        r = a.shape[1] if a.dim() == 3 else 0
        fits = fits and r >= 1 and a.shape == (experts, r, k) and b.shape == (experts, n, r)
    if not fits:
        factors = [f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}" for a, b in zip(lora_As, lora_Bs, strict=True)]
        raise ValueError(
            f"{WHERE}: shapes: got x {tuple(x.shape)}, weight {tuple(weight.shape)}, {', '.join(factors)}, want "
            f"x (rows, K), weight {layout}, lora_A (E, r, K), lora_B (E, N, r) with r >= 1"
        )
    rows = routing.num_tokens if gathered else routing.num_rows
    if experts != routing.num_experts or x.shape[0] != rows:
        raise ValueError(
            f"{WHERE}: routing: got {routing.num_tokens} tokens to {routing.top_k} of {routing.num_experts} experts "
            f"for x {tuple(x.shape)} and weight {tuple(weight.shape)}, want a routing of {experts} experts, and x "
            f"({rows}, K) {'with' if gathered else 'without'} gathered"
        )
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"{WHERE}: bias: got shape {tuple(bias.shape)}, want ({experts}, {n}) for weight {layout}")
    size = (routing.num_tokens, routing.top_k)
    if combine is not None and (combine.shape != size or not combine.is_floating_point()):
        raise ValueError(f"{WHERE}: combine: got {tuple(combine.shape)} of {combine.dtype}, want floats {size}")
    tensors = [weight, routing.order, *lora_As, *lora_Bs, *(t for t in (bias, combine) if t is not None)]
    if any(t.device != x.device for t in tensors):
        found = ", ".join(sorted({str(t.device) for t in (x, *tensors)}))
        raise ValueError(f"{WHERE}: devices: got {found}, want x, routing, weight and adapters on one")
    if not all(t.is_floating_point() for t in (x, weight, *lora_As, *lora_Bs)):
        found = ", ".join(sorted({str(t.dtype) for t in (x, weight, *lora_As, *lora_Bs)}))
        raise ValueError(f"{WHERE}: dtypes: got {found}, want floating-point tensors")
    if materialise and any(ps):
        raise ValueError(f"{WHERE}: materialise: got True with dropout {max(ps)}, which W + ΔW has no place for")
