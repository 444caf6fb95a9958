"""Tests that only a GPU can run: `pytest -m gpu tests/gpu`. Elsewhere they are skipped, with the reason."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU: torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"needs compute capability 8.0 or later, this GPU has {capability[0]}.{capability[1]}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why_not = _why_not()
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why_not is not None:
                item.add_marker(pytest.mark.skip(reason=why_not))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures go to the file GPU_FAILURES at once: bench/gpu.sh may be stopped before pytest's own summary."""
    if report.failed and (file := os.environ.get("GPU_FAILURES")):
        with Path(file).open("a") as failures:
            failures.write(f"{report.nodeid} ({report.when})\n{report.longreprtext[-2000:]}\n\n")


def memory_allocated() -> int:
    """Without cuBLAS's workspaces, of which the first call on each stream takes 32 MiB on Hopper."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.fixture
def allocated() -> Callable[[], int]:
    return memory_allocated


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(params=["cublas", "triton"])
def kernel_backend(request) -> str:
    """A backend made of hand-written kernels."""
    return request.param


@pytest.fixture(params=["torch", "cublas", "triton"])
def backend(request) -> str:
    return request.param
