"""Checks of arguments: a ValueError names the function that was called, the argument, what came and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn


def check(right: bool, caller: str, argument: str, value: Any, wanted: str) -> None:
    if not right:
        raise ValueError(f"{caller}: {argument}: got {value!r}, want {wanted}")


def check_module(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{caller}: model: got {type(model).__name__}, want a torch.nn.Module")


def check_choice(caller: str, argument: str, value: Any, choices: Iterable[str]) -> None:
    check(value in choices, caller, argument, value, f"one of {', '.join(choices)}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_integer(caller: str, argument: str, value: Any, least: int = 1, also: str = "") -> None:
    """`also`: what to say behind "an integer of at least 1"."""
    check(is_integer(value, least), caller, argument, value, f"an integer of at least {least}{also}")


def is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf


def check_positive(caller: str, argument: str, value: Any) -> None:
    check(is_positive(value), caller, argument, value, "a positive number")
