"""A model as it is now, to say later whether anything at all has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ModelState:
    """Remembers every module's class and `__dict__`, and every parameter and buffer by identity, bits and flag."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.classes = [type(module) for _, module in self.modules]
        self.attributes = [_shallow(module) for _, module in self.modules]
        self.tensors = list(_tensors(model))
        self.bits = [tensor.detach().clone() for _, tensor in self.tensors]
        self.flags = [tensor.requires_grad for _, tensor in self.tensors]

    @property
    def types(self) -> set[type]:
        return set(self.classes)

    def assert_unchanged(self, but_frozen: bool = False) -> None:
        """Nothing has changed since; with `but_frozen`, nothing but that all parameters are frozen now."""
        modules = list(self.model.named_modules(remove_duplicate=False))
        assert [(name, id(m)) for name, m in modules] == [(name, id(m)) for name, m in self.modules]
        assert [type(module) for _, module in modules] == self.classes
        if not but_frozen:
            for (name, module), attributes in zip(modules, self.attributes, strict=True):
                now = _shallow(module)
                assert now.keys() == attributes.keys(), f"{name}: attributes {now.keys() ^ attributes.keys()}"
                changed = [key for key in now if not _same(now[key], attributes[key])]
                assert not changed, f"{name}: changed attributes {changed}"
        tensors = list(_tensors(self.model))
        assert [(name, id(t)) for name, t in tensors] == [(name, id(t)) for name, t in self.tensors]
        self.assert_same_tensors(self.model)
        flags = [tensor.requires_grad for _, tensor in tensors]
        assert flags == ([False] * len(flags) if but_frozen else self.flags)

    def assert_same_tensors(self, model: nn.Module) -> None:
        """The model's parameters and buffers have the remembered names and bits (it may be a copy)."""
        tensors = list(_tensors(model))
        assert [name for name, _ in tensors] == [name for name, _ in self.tensors]
        for (name, tensor), bits in zip(tensors, self.bits, strict=True):
            assert tensor.dtype == bits.dtype and tensor.shape == bits.shape, name
            now, then = (one.detach().flatten().view(torch.uint8) for one in (tensor, bits))
            assert torch.equal(now, then), f"{name}: other bits"


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _shallow(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, its registries of parameters, hooks and the like copied one level deep."""
    return {key: value.copy() if isinstance(value, (dict, list)) else value for key, value in vars(module).items()}


def _same(now: Any, then: Any) -> bool:
    if isinstance(then, dict) and isinstance(now, dict):
        return list(now) == list(then) and all(now[key] is then[key] or _same(now[key], then[key]) for key in then)
    if isinstance(then, list) and isinstance(now, list):
        return len(now) == len(then) and all(a is b or _same(a, b) for a, b in zip(now, then, strict=True))
    if isinstance(then, (nn.Module, Tensor)):
        return now is then
    return now is then or now == then
