"""How a sketch sees a model's inputs and output gradients, and how the model is put back afterwards.

Each of `freeze`, `turn_dropout_off` and `attach` changes the model and returns what undoes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FIRST_LAYERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what turns a model's input into activations
DROPOUTS = (
    functional.dropout,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    torch.dropout,
)


class Pass(NamedTuple):
    """One backward: autograd's number for it, and what the losses of the forwards before it are means over, together
    (`tokens_of` each)."""

    number: int
    tokens: float


Observe = Callable[[str, Tensor, Tensor, Pass], None]
Others = Callable[[Any], Callable[[], None]]


@dataclass
class _Forwards:
    """The model's forwards since the last backward, which the next one goes through."""

    tokens: float = 0.0
    seen: bool = False  # by a backward


def freeze(model: nn.Module) -> Callable[[], None]:
    """No parameter requires grad, so that backward computes no weight gradient."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    for parameter, _ in flags:
        parameter.requires_grad_(False)
    return restore


def turn_dropout_off(model: nn.Module) -> Callable[[], None]:
    """Evaluation mode. Modules that checkpoint activations do so in training mode only (transformers' layers): they
    keep it, and their own calls of dropout are made to do nothing."""
    flags = [(module, module.training) for module in model.modules()]
    kept = [module for module, flag in flags if flag and getattr(module, "gradient_checkpointing", False)]
    handles = []
    for module in kept:  # as hooks of the module, because backward calls it again
        mode = _NoDropout()
        handles.append(module.register_forward_pre_hook(lambda *_, mode=mode: mode.__enter__() and None))
        handles.append(
            module.register_forward_hook(lambda *_, mode=mode: mode.__exit__(None, None, None), always_call=True)
        )

    def restore() -> None:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag

    for module, _ in flags:
        module.training = module in kept
    return restore


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:  # (query, key, value, attn_mask, dropout_p, ...)
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)


def attach(
    model: nn.Module, layers: dict[str, nn.Module], observe: Observe, others: Others | None = None
) -> Callable[[], None]:
    """Calls `observe(name, X, dY, pass)` for each call of each layer in the backward passes that train: those that
    leave gradients in all leaves, not `torch.autograd.grad` of something else, nor `backward(inputs=...)`.

    Its hooks come before those that are there, and see what the layer itself made. A second derivative, whose part in
    the weight no dYᵀX shows, raises RuntimeError in the backward pass that would need it.

    `others(shown)` attaches what is no layer, and returns what undoes it: `shown(y, x, deliver)` is y, whose gradient
    is given to `deliver(x, dy, pass)`.
    """
    forwards = _Forwards()

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal forwards
        if forwards.seen:
            forwards = _Forwards()
        elif forwards.tokens and _backward() != NO_BACKWARD:
            return  # a checkpoint recomputes the model
        if torch.is_grad_enabled():
            forwards.tokens += tokens_of(args, kwargs)

    def shown(y: Tensor, x: Tensor, deliver: Callable[[Tensor, Tensor, Pass], None]) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        now, outer = forwards, _backward()  # a reentrant checkpoint runs a backward of its own within another

        def look(x: Tensor, dy: Tensor) -> None:
            now.seen = True
            number = _backward() if outer == NO_BACKWARD else outer
            deliver(x, dy, Pass(number, max(now.tokens, 1.0)))

        return _shown(y, x, look)

    first = [functools.partial(model.register_forward_pre_hook, Hook(before), with_kwargs=True)]
    embeddings = (module for module in model.modules() if isinstance(module, FIRST_LAYERS))
    first += [functools.partial(module.register_forward_hook, Hook(_require_grad)) for module in embeddings]
    return _attach(layers, shown, observe, others, first)


def watch(layers: dict[str, nn.Module], observe: Observe, others: Others | None = None) -> Callable[[], None]:
    """Calls `observe(name, X, dY, pass)` in the backward passes that run anyway, whatever they are for: unlike `attach`
    it makes nothing require grad, and looks at no layer whose output does not. `others`: as for `attach`."""

    def shown(y: Tensor, x: Tensor, deliver: Callable[[Tensor, Tensor, Pass], None]) -> Tensor:
        if not y.requires_grad:
            return y
        return _Watched.apply(y, x.detach(), lambda x, dy: deliver(x, dy, Pass(_backward(), 1.0)))

    return _attach(layers, shown, observe, others, [])


def _attach(
    layers: dict[str, nn.Module],
    shown: Callable[..., Tensor],
    observe: Observe,
    others: Others | None,
    first: Sequence[Callable[[], Any]],
) -> Callable[[], None]:
    """Registers what `first` does, and for each layer a hook that shows its output with its input; returns what undoes
    it, or undoes it on an error."""
    undo: list[Callable[[], object]] = []

    def tap(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            x = _input(args, kwargs)
            if not isinstance(output, Tensor) or x is None:
                return output
            return shown(output, x, lambda x, dy, now: observe(name, x, dy, now))

        return Hook(hook)

    def restore() -> None:
        while undo:
            undo.pop()()

    try:
        if others is not None:
            undo.append(others(shown))
        undo.extend(register().remove for register in first)
        for name, module in layers.items():
            undo.append(module.register_forward_hook(tap(name), prepend=True, with_kwargs=True).remove)
    except BaseException:
        restore()
        raise
    return restore


NO_BACKWARD = -1


def _backward() -> int:
    """Autograd's number for the backward that runs now."""
    return torch._C._current_graph_task_id()


class Hook:
    """A module's hook that stays with this module: in a copy of it, and in a pickle, it does nothing."""

    def __init__(self, run: Callable[..., Any] | None = None) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return None if self.run is None else self.run(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return type(self), ()


def _input(args: tuple, kwargs: dict) -> Tensor | None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    return x if isinstance(x, Tensor) else None


def _shown(y: Tensor, x: Tensor, look: Callable[[Tensor, Tensor], None]) -> Tensor:
    """y, whose gradient is shown with x in the passes that reach the leaves: autograd computes the one of `leaf` where
    it would have computed the layer's weight's."""
    leaf = torch.empty(0, requires_grad=True)
    return _Tap.apply(y, _Observed.apply(leaf, x.detach(), y.detach(), look))


class _Tap(torch.autograd.Function):
    """The identity on a layer's output, whose gradient goes to `token` as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor) -> Tensor:
        return _same(y)  # in-place activations may follow

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph: W is used in dX = dY W too
            dy = _shown(dy, dy, _refuse)
        return dy, dy


class _Observed(torch.autograd.Function):
    """A token of y's shape, without memory of its own; its backward, which runs only where the leaf's gradient is
    wanted, shows the layer's input and the output's gradient.

    x is saved through autograd, so that activation checkpointing recomputes it like any other saved tensor.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, x: Tensor, y: Tensor, look: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.look = look
        return y.new_empty(()).expand(y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.look(ctx.saved_tensors[0], dy)
        return None, None, None, None


class _Watched(torch.autograd.Function):
    """The identity on a layer's output; its backward shows the layer's input and the output's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, look: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.look = look
        return _same(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.look(ctx.saved_tensors[0], dy)
        return dy, None, None


def _refuse(x: Tensor, dy: Tensor) -> None:
    raise RuntimeError(
        "fastlora: got a second derivative (create_graph=True, then backward) of a layer whose gradient is taken from "
        "its input and its output's gradient, which do not show all of it; want first derivatives only in a "
        "GradientSketch, and GaLoreAdamW(gradients='hook') or 'plain' for gradient penalties"
    )


def _require_grad(module: nn.Module, args: tuple, output: Any) -> Any:
    """Reentrant checkpointing differentiates only where an input requires grad; with every weight frozen none does."""
    if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad:
        return _same(output.requires_grad_())  # a leaf that requires grad could not be changed in place
    return output


def _same(tensor: Tensor) -> Tensor:
    """The tensor itself, but in autograd's eyes neither a leaf nor a view: it may be changed in place."""
    return torch.ops.aten._unsafe_view(tensor, tensor.shape)


def tokens_of(args: tuple, kwargs: dict) -> float:
    """What the loss of one forward is the mean over: its labels that are not -100, else its tokens but for padding,
    else its rows. Only the model's arguments tell: an expert of a mixture sees a part of the tokens."""
    labels, ids, mask = kwargs.get("labels"), kwargs.get("input_ids"), kwargs.get("attention_mask")
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        count = int((labels != -100).sum())
    elif isinstance(ids, Tensor):
        count = int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()
    elif first is None:
        count = 1
    elif first.is_floating_point() and first.dim() > 1:
        count = first.numel() // max(1, first.shape[-1])
    else:
        count = first.numel()
    return float(max(count, 1))
