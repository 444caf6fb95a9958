"""TRL's trainers, with an adapter on the output head of a plain patched model.

TRL 1.16 asks its models for log-probabilities without logits: `add_fused_lm_head` puts a forward on the instance that,
called with `fused_lm_head=True`, runs the model without its head and multiplies by `lm_head.weight`: an adapter gets
nothing. Two hooks come before and after whatever forward the model has: they send such a call to the model's own
forward, whose head gives `LazyLogits`, and answer with `lora_linear_log_probs` of those, so that scales and caps are
the model's. What TRL wants (temperature, fields) stands in the closure of its forward.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect.fused import remove_hooks
from ..layers.checks import is_overridden
from ..layers.head import Asked, output_head
from ..layers.linear import FusedLoraLinear
from ..ops.head.head import TokenScores
from ..ops.head.lazy import LazyLogits
from ..ops.reference import token_scores

_CALL = "_fastlora_trl"  # on a model during such a call: what TRL asked for, and the head's own `loss_trust`
_TAKEN = ("fused_lm_head", "labels", "shift_labels", "num_items_in_batch")
_SCORES = dict(zip(TokenScores._fields[1:], ("entropy", "top1", "mean_logits", "log_sum_sq_probs")))  # field, flag
_FIELDS = {"loss", "log_probs", *_SCORES, "label_mask", "aux_loss"}


def answer(model: nn.Module) -> None:
    """Lets a model whose output head has an adapter of ours answer TRL's calls."""
    forget(model)
    for module in model.modules():
        if isinstance(output_head(module), FusedLoraLinear):
            module.register_forward_pre_hook(_before, with_kwargs=True)
            module.register_forward_hook(_after, always_call=True)


def forget(model: nn.Module) -> None:
    """Takes `answer` back."""
    remove_hooks(model, (_before, _after))


def _before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    head = output_head(model)
    if not kwargs.get("fused_lm_head") or not isinstance(head, FusedLoraLinear):
        return None
    name = next((name for name, module in model.named_modules() if module is head), "the output head")
    wanted = _wanted(model)
    if isinstance(wanted, str) or is_overridden(head):
        why = wanted if isinstance(wanted, str) else "its forward was replaced (GRPO's cast_lm_head_to_fp32), or hooked"
        raise RuntimeError(
            f"fastlora: TRL called {type(model).__name__} with fused_lm_head=True, which would pass the adapter of "
            f"{name!r} by, and fastlora cannot answer the call: {why}. Undo that, or leave {name!r} out of "
            "patch's target_modules"
        )
    asked = {key: kwargs.get(key) for key in _TAKEN}
    model.__dict__[_CALL] = {**asked, **wanted}, head, head.loss_trust
    head.loss_trust = Asked()
    return args, {**{key: value for key, value in kwargs.items() if key not in _TAKEN}, "use_cache": False}


def _wanted(model: nn.Module) -> dict[str, Any] | str:
    """The temperature, the fields and the class of TRL's answer, from the forward that it left on the model, below what
    accelerate has put around that; or why they cannot be told."""
    pending, seen = [model.__dict__.get("forward")], set()
    while pending:
        function = pending.pop()
        function = getattr(function, "__func__", function)
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        inside: dict[str, Any] = {}
        if isinstance(function, types.FunctionType):
            cells = (cell.cell_contents for cell in function.__closure__ or ())
            inside = dict(zip(function.__code__.co_freevars, cells))
            output = function.__globals__.get("FusedCausalLMOutput")
            if output is not None and {"temperature", "outputs"} <= inside.keys():
                fields = {field.name for field in dataclasses.fields(output)}
                if unknown := (fields ^ _FIELDS) | {*inside["outputs"]} - _FIELDS:
                    return f"this version of TRL has other fields ({', '.join(sorted(unknown))})"
                return {"output": output, "outputs": inside["outputs"], "temperature": inside["temperature"]}
        below = (getattr(function, name, None) for name in ("__wrapped__", "model_forward"))
        pending += [one for one in (*inside.values(), *below) if callable(one)]
    return "this version of TRL keeps no temperature and outputs in its forward"


def _after(model: nn.Module, args: Any, output: Any) -> Any:
    if (call := model.__dict__.pop(_CALL, None)) is None:
        return None
    asked, head, head.loss_trust = call
    if output is None:  # an exception
        return None
    logits, labels = output.logits, asked["shift_labels"]
    if labels is None:
        logits, labels = logits[:, :-1], asked["labels"][:, 1:]
    labels = labels.to(logits.device)
    flags = {flag: field in asked["outputs"] for field, flag in _SCORES.items()}
    scores = _scores(logits, labels, asked["temperature"], flags)
    mask, count = labels != -100, asked["num_items_in_batch"]
    loss = -scores.log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count)
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is not None:
        config: Any = model.config
        loss = loss + getattr(config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return asked["output"](loss=loss, **scores._asdict(), label_mask=mask, aux_loss=aux_loss)


def _scores(logits: Tensor, labels: Tensor, temperature: float, flags: dict[str, bool]) -> TokenScores:
    if isinstance(logits, LazyLogits):
        return logits.log_probs(labels, temperature, **flags)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # DoRA, several adapters
    log_probs = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    found = zip(flags.values(), token_scores(z, labels), strict=True)
    return TokenScores(log_probs, *(score if wanted else None for wanted, score in found))
