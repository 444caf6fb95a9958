"""The first use of hand-written kernels: a small problem through them and the reference, before they are trusted."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import torch
from torch import Tensor

NOT_YET = "not checked yet, and nothing can be checked during capture: run one eager step first"


def nothing_can_run(device: torch.device) -> bool:
    """Within compilation or the capture of a CUDA graph, where neither a check nor a measurement may be launched."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def too_old(device: torch.device) -> str | None:
    """Why this GPU runs no hand-written kernel; None where it does, and elsewhere than on a GPU."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    return None


def module_or_reason(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported: Triton missing, or broken in a way of its own."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Trusted:
    """Hand-written kernels that run only where they were found right: at their first use on a device a small problem is
    compared with a reference, once for each key."""

    def __init__(self, what: str, instead: str) -> None:
        self.what, self.instead = what, instead  # what the warning says failed, and what runs in its place
        self.verdicts: dict[tuple, str | None] = {}  # None: right

    def why_not(self, key: tuple, check: Callable[[], str | None]) -> str | None:
        """None where `check` finds nothing wrong, else why the kernels are not used. The key begins with the device,
        then the dtype."""
        if key in self.verdicts:
            return self.verdicts[key]
        reason = too_old(key[0]) or (NOT_YET if nothing_can_run(key[0]) else None)
        if reason is not None:
            return reason
        try:
            failure = check()
        except Exception as error:  # a kernel that does not compile or launch must not take the training run with it
            failure = f"{type(error).__name__}: {error}"
        self.verdicts[key] = failure
        if failure is not None:
            where = " for ".join(map(str, key[:2]))
            warnings.warn(
                f"fastlora: {self.what} failed its self-check on {where} and is not used; {self.instead}: {failure}",
                RuntimeWarning,
                stacklevel=3,
            )
        return failure


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


LINE = 3.0  # how many times the error of the whole a row or a column may have: a wrong one of thousands is lost in it


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖/‖want‖, or a third of the same of the worst row or column against an average one; NaN where either
    is."""
    dtype = torch.float64 if want.dtype == torch.float64 else torch.float32  # summed in it, without a copy in it
    difference, size = got - want, torch.linalg.vector_norm(want, dtype=dtype)
    errors = [torch.linalg.vector_norm(difference, dtype=dtype)]
    if want.dim() == 2 and want.numel():
        for dim in (0, 1):
            worst = torch.linalg.vector_norm(difference, dim=dim, dtype=dtype).max()
            errors.append(worst * (want.shape[1 - dim] ** 0.5 / LINE))
    return (torch.stack(errors).max() / size).item()


def first_difference(results: Iterable[tuple[str, Tensor, Tensor]], dtype: torch.dtype) -> str | None:
    """The first of (name, got, wanted in fp64) that is wrong for a computation in `dtype`; None where all are right."""
    allowed = 4e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-3  # a wrong kernel is wrong by 1
    for name, got, want in results:
        error = relative_error(got, want)
        if not error <= allowed:
            return f"{name} differs from the reference by {error:.1e} (relative), allowed {allowed:.0e}"
    return None
