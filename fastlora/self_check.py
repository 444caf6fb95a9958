"""The first use of hand-written kernels: a small problem through them and the reference, before they are trusted."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference

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


def self_check(
    module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool
) -> str | None:
    """Compares a backend's forward and gradients with the fp64 reference on a small problem that divides nothing.

    None where they agree, else what differs. With dropout the mask is read off the backend itself: with A = I, S is
    drop(x). The generators' states are left as they were.
    """
    with seeded(device), torch.no_grad():
        return _compare_with_reference(module, device, dtype, adapter_dtype, 0.25 if dropout else 0.0)


def _compare_with_reference(
    module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout_p: float
) -> str | None:
    m, n, k = 203, 152, 72
    r = k if dropout_p else 10  # small enough for S inside the GEMM, which takes no dropout
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    bias = torch.randn(n, device=device).to(dtype)
    a = torch.eye(k, device=device) if dropout_p else torch.randn(r, k, device=device) * k**-0.5
    a, b = a.to(adapter_dtype), (torch.randn(n, r, device=device) * r**-0.5).to(adapter_dtype)
    dy = torch.randn(m, n, device=device).to(dtype)
    scaling = 1.5

    y, s, state = module.forward(x, weight, bias, a, b, scaling, dropout_p)
    grads = module.backward(dy, x, weight, a, b, s, state, scaling, dropout_p, (True, True, True))

    keep = (s != 0) if dropout_p else None
    if keep is not None and not 0.6 < keep.double().mean().item() < 0.9:
        return f"the kept fraction is {keep.double().mean().item():.2f}, expected about {1 - dropout_p}"
    leaves = [t.double().requires_grad_() for t in (x, a, b)]
    with torch.enable_grad():
        expected = reference.lora_linear(
            leaves[0], weight.double(), leaves[1], leaves[2], scaling, bias.double(), dropout_p, keep
        )
    expected_grads = torch.autograd.grad(expected, leaves, dy.double())
    names = ("output", "gradient of x", "gradient of lora_A", "gradient of lora_B")
    return first_difference(zip(names, (y, *grads), (expected.detach(), *expected_grads), strict=True), dtype)
