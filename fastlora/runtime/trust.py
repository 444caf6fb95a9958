"""The first use of hand-written kernels: a small problem through them and the reference, before they are trusted."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

NOT_YET = "not checked yet, and nothing can be checked during capture: run one eager step first"


def first_use(
    verdicts: dict[Any, str | None], key: Hashable, check: Callable[[], str | None], what: str, where: str, instead: str
) -> str | None:
    """None where `check` found nothing wrong at the first use, else why the kernels are not trusted.

    `verdicts` keeps the answer. `what`, `where` and `instead` are for the warning: what failed, on which device and
    for which dtypes, and what runs in its place.
    """
    if key not in verdicts:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return NOT_YET
        try:
            failure = check()
        except Exception as error:  # a kernel that does not compile or launch must not take the training run with it
            failure = f"{type(error).__name__}: {error}"
        verdicts[key] = failure
        if failure is not None:
            warnings.warn(
                f"fastlora: {what} failed its self-check on {where} and is not used; {instead}: {failure}",
                RuntimeWarning,
                stacklevel=3,
            )
    return verdicts[key]


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Within it the generators of the CPU and of this device start at 0, in no inference mode (the reference is
    differentiated); afterwards they are as they were. No other device's generator is touched."""
    on_gpu = device.type == "cuda"
    with torch.inference_mode(False), torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach every GPU's generator
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def first_difference(results: Iterable[tuple[str, Tensor, Tensor]], dtype: torch.dtype) -> str | None:
    """The first of (name, got, wanted in fp64) that is wrong for a computation in `dtype`; None where all are right."""
    allowed = 4e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-3  # a wrong kernel is wrong by 1
    for name, got, want in results:
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error <= allowed:
            return f"{name} differs from the reference by {error:.1e} (relative), allowed {allowed:.0e}"
    return None
