"""The output head with LoRA inside its loss: cross-entropy and log-probabilities of y = h W0ᵀ + b + s·(drop(h) Aᵀ) Bᵀ
without the logits, of which a chunk of tokens exists at a time.

A scalar loss makes its gradients in the forward pass and scales them in the backward pass: no product is done twice.
They are those of the sum over tokens, so that half precision does not lose them before a loss scale arrives. Losses of
single tokens keep lse (a number a token) and form the logits again in the backward pass.

Both are `torch.library` ops, the same for eager calls and `torch.compile`. The mask of dropout is drawn outside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime import env
from ...runtime.trust import Trusted, first_difference, module_or_reason, seeded
from .. import call, reference
from ..lora.aten import draw_keep_mask
from . import aten
from .aten import Gradients, Head, Loss

IGNORE_INDEX = -100
REDUCTIONS = ("mean", "sum", "none")


class TokenScores(NamedTuple):
    """What `lora_linear_log_probs` returns where one of its flags is set: tensors of the labels' shape, None what was
    not asked for. Log-probabilities and entropies have gradients."""

    log_probs: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def lora_linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    *,
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The cross-entropy of a head with a low-rank adapter; never more than a chunk of its logits exists.

    Equivalent to:

        logits = multi_lora_linear(h, weight, [Adapter(lora_A, lora_B, scaling, dropout_p)], bias, training).float()
        logits = logit_scale * logits
        logits = softcap * torch.tanh(logits / softcap)                               # with a soft cap
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, ...)

    Args:
        h: (..., H), float32, float64, bfloat16 or float16. weight: (V, H) of h's dtype. bias: (V,) or None.
        lora_A: (r, H). lora_B: (V, r), of any float dtype; both None for a frozen head. scaling: s.
        labels: integers of h's shape without H, not shifted here; `ignore_index` tokens count for nothing and cost
            nothing.
        dropout_p: probability, in [0, 1], of dropping an element of h on the low-rank path; used when `training`.
        reduction: "mean" over the tokens that count, "sum" or "none".
        num_items_in_batch: with "mean" or "sum", the sum is divided by it (transformers' gradient accumulation).
        label_smoothing: as in `F.cross_entropy`. softcap: Gemma's; logit_scale: Cohere's, Granite's inverse.
        z_loss: the coefficient ζ of ζ·lse² for each token (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

    Returns:
        A scalar in float32 (float64 for float64), or (...,) with "none". Without a token that counts, "mean" is NaN, as
        torch's is, with gradients of zero. Differentiable once in h, weight, bias, lora_A and lora_B.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, labels that are no word, A without B, an
            unknown reduction, an option out of range.

    Examples:
        >>> h, weight, labels = torch.randn(4, 32, 64), torch.randn(1000, 64), torch.randint(1000, (4, 32))
        >>> lora_linear_cross_entropy(h, weight, None, None, labels, 1.0).shape
        torch.Size([])

    Source: chunks of logits with gradients made at once, Wijmans et al. 2024, Cut Your Losses, arXiv 2411.09009, and
    Hsu et al. 2024, Liger Kernel, arXiv 2410.10989; here with a low-rank term.
    """
    where = "lora_linear_cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{where}: reduction: got {reduction!r}, want one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{where}: label_smoothing: got {label_smoothing}, want a number in [0, 1]")
    if not (math.isfinite(z_loss) and z_loss >= 0.0):
        raise ValueError(f"{where}: z_loss: got {z_loss}, want a number of at least 0")
    if num_items_in_batch is not None and reduction == "none":
        raise ValueError(f"{where}: num_items_in_batch: got one with reduction 'none', want 'mean' or 'sum'")
    dropout_p = dropout_p if training else 0.0
    head = _head(h, weight, bias, lora_A, lora_B, labels, scaling, dropout_p, logit_scale, softcap, 1.0, where)
    loss = Loss(label_smoothing, z_loss)
    if reduction == "none":
        return -_per_token(h, head, labels, ignore_index, loss, where).log_probs
    total, count = _summed(h, head, labels, ignore_index, loss, where)
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
    return total / count if reduction == "mean" else total


def lora_linear_log_probs(
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    ignore_index: int = IGNORE_INDEX,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    top1: bool = False,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
) -> Any:
    """log p(label) of every token under a head with a low-rank adapter, differentiable, for preference and RL losses.

    Equivalent to:

        logits = lora_linear(h, weight, lora_A, lora_B, scaling, bias, dropout_p, training).float() / temperature
        log_probs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    Arguments as in `lora_linear_cross_entropy`; `temperature` divides the logits last. Tokens whose label is
    `ignore_index` get 0, and no gradient.

    Returns:
        (...,) in float32 (float64 for float64). With one of the flags a `TokenScores`: the entropy of each token's
        distribution in nats, differentiable as the log-probability; whether its label is the likeliest word; the mean
        of its logits; log Σ p²; 0 and False for ignored tokens.

    Raises:
        ValueError: as `lora_linear_cross_entropy`; a temperature that is not positive.
    """
    where = "lora_linear_log_probs"
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"{where}: temperature: got {temperature}, want a positive number")
    dropout_p = dropout_p if training else 0.0
    head = _head(h, weight, bias, lora_A, lora_B, labels, scaling, dropout_p, logit_scale, softcap, temperature, where)
    wanted = (entropy, top1, mean_logits, log_sum_sq_probs)
    scores = _per_token(h, head, labels, ignore_index, Loss(), where, wanted)
    return scores if any(wanted) else scores.log_probs


def _head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    scaling: float,
    dropout_p: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    where: str,
) -> Head:
    """The arguments as one, checked. Raises ValueError naming the function `where`."""
    if (lora_A is None) != (lora_B is None):
        given, missing = ("lora_A", "lora_B") if lora_B is None else ("lora_B", "lora_A")
        raise ValueError(f"{where}: {missing}: got None beside {given}, want both, or neither for a frozen head")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{where}: labels: got {got}, want integers")
    if h.dim() < 1 or labels.shape != h.shape[:-1]:
        raise ValueError(
            f"{where}: labels: got {tuple(labels.shape)}, want {tuple(h.shape[:-1])} for h {tuple(h.shape)}"
        )
    if labels.device != h.device:
        raise ValueError(f"{where}: labels: got them on {labels.device}, want {h.device} as h")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0.0):
        raise ValueError(f"{where}: softcap: got {softcap}, want a positive number or None")
    if not math.isfinite(logit_scale):
        raise ValueError(f"{where}: logit_scale: got {logit_scale}, want a finite number")
    if weight.dim() != 2 or h.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{where}: weight: got {tuple(weight.shape)} for h {tuple(h.shape)}, want (V, H) with h (..., H)"
        )
    empty = h.new_empty(1, weight.shape[1])
    a = empty if lora_A is None else lora_A
    b = h.new_empty(weight.shape[0], 1) if lora_B is None else lora_B
    call.check_call(h, weight, call.Adapter(a, b, scaling, dropout_p), bias, where)
    if not call.autocast_enabled(h):
        call.check_one_dtype(h, weight, bias, where)
    return Head(weight, bias, lora_A, lora_B, scaling, dropout_p, logit_scale, softcap or 0.0, temperature)


def _prepared(h: Tensor, head: Head) -> tuple[Tensor, Head]:
    """h (T, H) and the head, in autocast's dtype where it is on; the low-rank path is in float32 all the same."""
    if call.autocast_enabled(h):
        cast, weight, bias = call.cast_for_autocast(h, head.weight, head.bias)
        h, head = cast, head._replace(weight=weight, bias=bias)
    call.check_one_dtype(h, head.weight, head.bias)
    return h.reshape(-1, h.shape[-1]), head


def _mask(h: Tensor, head: Head) -> Tensor | None:
    return draw_keep_mask(h, head.dropout_p) if head.lora_A is not None and head.dropout_p > 0.0 else None


def _summed(h: Tensor, head: Head, labels: Tensor, ignore_index: int, loss: Loss, where: str) -> tuple[Tensor, Tensor]:
    """(Σ ℓ over the tokens that count, how many they are)."""
    h2, head = _prepared(h, head)
    labels = labels.reshape(-1)
    if not call.takes_fused_path(h2, *head[:4], labels):
        losses = reference.head_losses(h2, *head, labels, ignore_index, *loss)
        return losses.sum(), (labels != ignore_index).sum()
    needs = [_needed(t) for t in (h2, head.lora_A, head.lora_B, head.weight, head.bias)]
    with call.without_autocast(h2):
        found = torch.ops.fastlora.head_sum(
            h2, *head[:4], labels, _mask(h2, head), *head[4:], ignore_index, *loss, needs, where
        )
    return found[0], found[1]


def _per_token(
    h: Tensor, head: Head, labels: Tensor, ignore_index: int, loss: Loss, where: str, wanted: Sequence[bool] = ()
) -> TokenScores:
    """What is `wanted` of each token, of the labels' shape, with −ℓ as its log-probability."""
    h2, head = _prepared(h, head)
    flat, wanted = labels.reshape(-1), [*wanted] or [False] * 4
    if call.takes_fused_path(h2, *head[:4], flat):
        with call.without_autocast(h2):
            losses, _, *scores = torch.ops.fastlora.head_tokens(
                h2, *head[:4], flat, _mask(h2, head), *head[4:], ignore_index, *loss, wanted, where
            )
    else:
        z = reference.head_logits(h2, *head)
        losses = reference.token_losses(z, flat, ignore_index, *loss)
        scores = reference.token_scores(z, flat, ignore_index)
    found = [score.view(labels.shape) if want else None for want, score in zip(wanted, scores)]
    return TokenScores(-losses.view(labels.shape), *found)


def _needed(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


# The ops. `head` below is what Head holds, as an op's arguments.
_HEAD = "Tensor h, Tensor weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, Tensor labels, Tensor? keep, "
_NUMBERS = "float scaling, float dropout_p, float logit_scale, float softcap, float temperature, int ignore_index, "
_NUMBERS += "float label_smoothing, float z_loss, "
_library = torch.library.Library("fastlora", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    f"head_sum({_HEAD}{_NUMBERS}bool[] needs, str caller) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    f"head_tokens({_HEAD}{_NUMBERS}bool[] wanted, str caller) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    f"head_tokens_backward(Tensor? grad, Tensor? grad_entropy, Tensor lse, Tensor entropy, {_HEAD}{_NUMBERS}"
    "bool[] needs, str caller) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


class _Tokens(NamedTuple):
    """Which rows count (None: all of them), their labels, each within the vocabulary, and a 0 or 1 for each row where
    the rows cannot be picked out (during CUDA-graph capture nothing may wait for the device)."""

    rows: Tensor | None
    labels: Tensor
    counted: Tensor | None
    count: Tensor


def _tokens(labels: Tensor, vocabulary: int, ignore_index: int, caller: str) -> _Tokens:
    counts = labels != ignore_index
    wrong = counts & ((labels < 0) | (labels >= vocabulary))
    count = counts.sum()
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return _Tokens(None, labels.masked_fill(~counts, 0).long(), counts, count)
    number, faults = torch.stack([count, wrong.sum()]).tolist()  # one wait for the device
    if faults:
        first = labels[wrong][0].item()
        raise ValueError(
            f"{caller}: labels: got {first} ({faults} such), want words from 0 to {vocabulary - 1}, or ignore_index "
            f"({ignore_index}) for tokens that do not count"
        )
    rows = None if number == labels.shape[0] else counts.nonzero().squeeze(1)
    return _Tokens(rows, labels.masked_fill(~counts, 0).long(), None, count)


_trusted = Trusted("the kernel of the head's loss", "ATen runs instead")


def _backend(h: Tensor, head: Head) -> ModuleType:
    """What passes over a chunk's logits: the kernel on a GPU, once it has passed its first-use check, else ATen."""
    if not h.is_cuda or h.dtype == torch.float64 or head.logit_scale <= 0.0 or env.backend() == "torch":
        return aten
    module = module_or_reason("fastlora.ops.head.triton")
    if isinstance(module, str) or _trusted.why_not((h.device, torch.float32), lambda: self_check(module, h.device)):
        return aten
    return module


def self_check(module: ModuleType, device: torch.device) -> str | None:
    """Compares losses, scores and gradients of logits with fp64, at vocabularies beyond a block, with every option."""
    with seeded(device):
        for words in (4112, 4201):
            z, labels = 4 * torch.randn(5, words, device=device), torch.randint(words, (5,), device=device)
            labels[0] = z[0].argmax()
            empty = z.new_empty(0, 1)
            head = Head(empty, None, None, None, 1.0, 0.0, 0.75, 5.0, 0.7)
            loss, grads = Loss(0.1, 0.01), torch.randn(2, 5, device=device)

            def chunk(z: Tensor = z, labels: Tensor = labels, empty: Tensor = empty) -> aten.Chunk:
                return aten.Chunk(slice(None), empty, labels, None, None, None, z.clone(), None)

            exact = z.double().requires_grad_()
            scaled = reference.scaled_logits(exact, 0.75, 5.0, 0.7)
            want = [reference.token_losses(scaled, labels, -100, *loss)]
            want += reference.token_scores(scaled, labels)
            (grad,) = torch.autograd.grad([want[0], want[1]], exact, list(grads.double()), retain_graph=True)
            (plain,) = torch.autograd.grad(want[0].sum(), exact)
            losses, lse, *got = module.scores(chunk(), head, loss, [True] * 4)
            one, other = chunk(), chunk()
            module.gradient_(one, head, loss, lse, grads[0], grads[1], got[0])
            of_sum = module.losses_(other, head, loss, None, True)
            pairs = [*zip((losses, *got), want, strict=True), (one.z, grad), (of_sum, want[0]), (other.z, plain)]
            names = ("ℓ", "entropy", "top-1", "mean", "log Σ p²", "dz", "ℓ of a sum", "dz of a sum")
            found = [(name, a.float(), b.detach().double()) for name, (a, b) in zip(names, pairs, strict=True)]
            if (failure := first_difference(found, torch.float32)) is not None:
                return f"{words} words: {failure}"
    return None


def _arguments(h, weight, bias, lora_A, lora_B, numbers):
    return Head(weight, bias, lora_A, lora_B, *numbers[:5]), Loss(*numbers[6:8]), numbers[5]


def _not_none(h: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(h.new_empty(0) if grad is None else grad for grad in grads)


def _sum(h, weight, bias, lora_A, lora_B, labels, keep, *rest):
    *numbers, needs, caller = rest
    head, loss, ignore_index = _arguments(h, weight, bias, lora_A, lora_B, numbers)
    tokens = _tokens(labels, weight.shape[0], ignore_index, caller)
    into = Gradients(h, head, tuple(needs))
    total = torch.zeros((), dtype=torch.float64, device=h.device)  # a number a chunk: its rounding costs nothing
    wide, backend = aten.widened(h, head), _backend(h, head)
    for chunk in aten.chunks(h, wide, tokens.labels, keep, tokens.rows, backend.RAW):
        counted = None if tokens.counted is None else tokens.counted[chunk.rows]
        losses = backend.losses_(chunk, wide, loss, counted, any(needs))
        total += (losses if counted is None else torch.where(counted, losses, 0)).sum(dtype=total.dtype)
        if any(needs):
            aten.accumulate(chunk, wide, into)
    return total.to(torch.promote_types(h.dtype, torch.float32)), tokens.count, *_not_none(h, into.tensors(head))


def _token_losses(h, weight, bias, lora_A, lora_B, labels, keep, *rest):
    *numbers, wanted, caller = rest
    head, loss, ignore_index = _arguments(h, weight, bias, lora_A, lora_B, numbers)
    tokens = _tokens(labels, weight.shape[0], ignore_index, caller)
    found = [torch.zeros_like(like) for like in _tokens_fake(h, weight, bias, lora_A, lora_B, labels, keep, *rest)]
    wide, backend = aten.widened(h, head), _backend(h, head)
    for chunk in aten.chunks(h, wide, tokens.labels, keep, tokens.rows, backend.RAW):
        for all_of_it, part in zip(found, backend.scores(chunk, wide, loss, wanted), strict=True):
            if part is not None:
                all_of_it[chunk.rows] = part
    if tokens.counted is not None:
        losses, lse, *scores = found
        found = [losses * tokens.counted, lse, *(s * tokens.counted if s.numel() else s for s in scores)]
    return tuple(found)


def _token_losses_backward(grad, grad_entropy, lse, entropy, h, weight, bias, lora_A, lora_B, labels, keep, *rest):
    *numbers, needs, caller = rest
    head, loss, ignore_index = _arguments(h, weight, bias, lora_A, lora_B, numbers)
    tokens = _tokens(labels, weight.shape[0], ignore_index, caller)
    into = Gradients(h, head, tuple(needs))
    wide, backend = aten.widened(h, head), _backend(h, head)
    grad = torch.zeros_like(lse[:, 0]) if grad is None else grad
    if tokens.counted is not None:
        grad = grad * tokens.counted
        grad_entropy = None if grad_entropy is None else grad_entropy * tokens.counted
    of_entropy = (grad_entropy, entropy) if grad_entropy is not None else ()
    for chunk in aten.chunks(h, wide, tokens.labels, keep, tokens.rows, backend.RAW):
        backend.gradient_(chunk, wide, loss, *(vector[chunk.rows] for vector in (lse, grad, *of_entropy)))
        aten.accumulate(chunk, wide, into)
    return _not_none(h, into.tensors(head))


def _fake_gradients(h, weight, bias, lora_A, lora_B, needs):
    of = (h, lora_A, lora_B, weight, bias)
    return tuple(
        h.new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in zip(of, needs, strict=True)
    )


def _sum_fake(h, weight, bias, lora_A, lora_B, labels, keep, *rest):
    wide = torch.promote_types(h.dtype, torch.float32)
    numbers = h.new_empty((), dtype=wide), h.new_empty((), dtype=torch.int64)
    return *numbers, *_fake_gradients(h, weight, bias, lora_A, lora_B, rest[-2])


def _tokens_fake(h, weight, bias, lora_A, lora_B, labels, keep, *rest):
    wide = torch.promote_types(h.dtype, torch.float32)
    kinds = zip((wide, torch.bool, wide, wide), rest[-2], strict=True)
    scores = (h.new_empty(h.shape[0] if want else 0, dtype=dtype) for dtype, want in kinds)
    return h.new_empty(h.shape[0], dtype=wide), h.new_empty(h.shape[0], 2, dtype=wide), *scores


def _tokens_backward_fake(grad, grad_entropy, lse, entropy, h, weight, bias, lora_A, lora_B, labels, keep, *rest):
    return _fake_gradients(h, weight, bias, lora_A, lora_B, rest[-2])


def _only_once() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastlora: the head's loss is differentiable once, and a gradient of its gradient was asked for"
        )


def _sum_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.needs = inputs[-2]
    ctx.count = len(inputs)
    ctx.save_for_backward(*(grad for grad, need in zip(output[2:], ctx.needs, strict=True) if need))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _placed(h: Any, lora_A: Any, lora_B: Any, weight: Any, bias: Any, count: int) -> tuple:
    """Gradients in the order of an op's arguments."""
    return h, weight, bias, lora_A, lora_B, *(None,) * (count - 5)


def _sum_backward(ctx: Any, grad: Tensor | None, *_: Any):
    _only_once()
    saved = iter(ctx.saved_tensors)
    made = [next(saved) if need else None for need in ctx.needs]
    if grad is None:
        return (None,) * ctx.count
    # The product in float32: half precision holds the gradient of a sum and not always its share of a mean.
    return _placed(*(None if g is None else (g * grad).to(g.dtype) for g in made), count=ctx.count)


def _tokens_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:3], *inputs[:7])
    ctx.numbers, ctx.caller = inputs[7:-2], inputs[-1]
    ctx.count = len(inputs)
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.set_materialize_grads(False)


def _tokens_backward(ctx: Any, grad: Tensor | None, _: Any, grad_entropy: Tensor | None, *__: Any):
    _only_once()
    if grad is None and grad_entropy is None:
        return (None,) * ctx.count
    lse, entropy, h, weight, bias, lora_A, lora_B, labels, keep = ctx.saved_tensors
    need_h, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    needs = [need_h, need_a, need_b, need_w, need_bias]
    head = (h, weight, bias, lora_A, lora_B, labels, keep)
    with call.without_autocast(h):
        made = torch.ops.fastlora.head_tokens_backward(
            grad, grad_entropy, lse, entropy, *head, *ctx.numbers, needs, ctx.caller
        )
    return _placed(*(g if need else None for g, need in zip(made, needs, strict=True)), count=ctx.count)


for _name, _run, _fake in (
    ("head_sum", _sum, _sum_fake),
    ("head_tokens", _token_losses, _tokens_fake),
    ("head_tokens_backward", _token_losses_backward, _tokens_backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)
torch.library.register_autograd("fastlora::head_sum", _sum_backward, setup_context=_sum_context, lib=_library)
torch.library.register_autograd("fastlora::head_tokens", _tokens_backward, setup_context=_tokens_context, lib=_library)
