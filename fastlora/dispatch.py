"""Which backend runs a call, and why.

On a CPU: `torch`. On a GPU: `cublas` once it has passed its self-check on that device, `torch` otherwise; `triton` by
request (it is the faster one only where its GEMM reaches 96 % of cuBLAS: docs/kernels/gemm.md). A request comes as
`backend=` or as `FASTLORA_BACKEND`; a backend that cannot take a call falls down one step (triton, cublas, torch), with
the reason in the `Choice`.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import env, reference
from .backends import torch as torch_backend

FALL_DOWN = ("triton", "cublas", "torch")
BACKENDS = env.BACKENDS


class Choice(NamedTuple):
    """The backend that takes a call, its module, and the reason: why it was preferred, or why better ones could not."""

    name: str
    module: ModuleType
    reason: str


_ASKED_FOR_TORCH = Choice("torch", torch_backend, "asked for")
_NOT_A_GPU = Choice("torch", torch_backend, "not on a GPU: ATen is the path there")

_modules: dict[str, ModuleType | str] = {}  # a module, or why it cannot be imported
_self_checks: dict[tuple[str, str, torch.dtype, torch.dtype, bool], str | None] = {}  # None: passed


def select(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    backend: str = "auto",
) -> Choice:
    """The backend for a call with 2-D `x`. Raises ValueError for a name that is none of BACKENDS."""
    requested = env.backend() if backend == "auto" else backend
    if requested not in BACKENDS:
        raise ValueError(f"fastlora: backend: got {requested!r}, want one of {', '.join(BACKENDS)}")
    if requested == "torch":
        return _ASKED_FOR_TORCH
    if requested == "auto" and x.device.type != "cuda":
        return _NOT_A_GPU
    reasons = ["asked for" if requested != "auto" else "default on a GPU"]
    start = FALL_DOWN.index("cublas" if requested == "auto" else requested)
    for name in FALL_DOWN[start:-1]:
        why_not = _why_not(name, x, weight, bias, lora_A, lora_B, dropout_p)
        if why_not is None:
            return Choice(name, load(name), "; ".join(reasons))
        reasons.append(f"{name}: {why_not}")
    return Choice("torch", torch_backend, "; ".join(reasons[1:]))


def load(name: str) -> ModuleType:
    """The backend's module. Raises RuntimeError where it cannot be imported (Triton missing)."""
    module = _import(name)
    if isinstance(module, str):
        raise RuntimeError(f"fastlora: backend {name!r} cannot be loaded: {module}")
    return module


def _import(name: str) -> ModuleType | str:
    if name not in _modules:
        try:
            _modules[name] = importlib.import_module(f"fastlora.backends.{name}")
        except Exception as error:  # Triton missing, or broken in a way of its own: training goes on without it
            _modules[name] = f"{type(error).__name__}: {error}"
    return _modules[name]


def _why_not(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout_p: float
) -> str | None:
    module = _import(name)
    if isinstance(module, str):
        return f"cannot be imported: {module}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    reason = module.unsupported(x, weight, bias, lora_A, lora_B, dropout_p)
    if reason is None and x.device.type == "cuda":
        reason = _self_check_failure(name, module, x.device, x.dtype, lora_A.dtype, dropout_p > 0.0)
    return reason


def _self_check_failure(
    name: str, module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool
) -> str | None:
    """None where the backend has been compared with the reference on this device and agrees; otherwise why it is not
    trusted."""
    key = (name, str(device), dtype, adapter_dtype, dropout)
    if key not in _self_checks:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return "not checked yet, and nothing can be checked during capture or compilation: run one eager step first"
        try:
            failure = self_check(module, device, dtype, adapter_dtype, dropout)
        except Exception as error:  # a kernel that does not compile or launch must not take the training run with it
            failure = f"{type(error).__name__}: {error}"
        _self_checks[key] = failure
        if failure is not None:
            warnings.warn(
                f"fastlora: backend {name!r} failed its self-check on {device} for {dtype} and is not used: {failure}. "
                "Run `python -m fastlora.doctor` for details.",
                RuntimeWarning,
                stacklevel=2,
            )
    return _self_checks[key]


def self_check(
    module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool
) -> str | None:
    """Compares a backend's forward and gradients with the fp64 reference on a small problem that divides nothing.

    None where they agree, else what differs. With dropout the mask is read off the backend itself: with A = I, S is
    drop(x). The generators' states are left as they were.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach every GPU's generator
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        return _compare_with_reference(module, device, dtype, adapter_dtype, 0.25 if dropout else 0.0)


def _compare_with_reference(
    module: ModuleType, device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout_p: float
) -> str | None:
    m, n, k = 203, 152, 72
    r = k if dropout_p else 10
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
    tolerance = (
        4e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-3
    )  # a wrong kernel is wrong by 1, not by a rounding
    names = ("output", "gradient of x", "gradient of lora_A", "gradient of lora_B")
    for name, got, want in zip(names, (y, *grads), (expected, *expected_grads), strict=True):
        error = ((got.double() - want).norm() / want.norm()).item()
        if not error <= tolerance:
            return f"{name} differs from the reference by {error:.1e} (relative), allowed {tolerance:.0e}"
    return None
