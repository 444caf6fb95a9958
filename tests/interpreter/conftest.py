"""These tests run the Triton kernels on CPU tensors, in a process of their own:

    TRITON_INTERPRET=1 python -m pytest tests/interpreter

The variable is read when a kernel is decorated, and Triton decorates its own library when it is imported, so it must be
set before. Without it the tests are skipped.
"""

import importlib.util
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_INTERPRETED = False

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # Triton exists on Linux only
else:
    import bf16_repair
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    _INTERPRETED = isinstance(tl.cdiv, InterpretedFunction)
    if _INTERPRETED:
        bf16_repair.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1, set before triton is imported")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_plans():
    """A test that puts something in a launcher's place sees it called."""
    if importlib.util.find_spec("triton") is not None:
        from fastlora.kernels import launch

        launch.forget_plans()
