"""Before anything imports torch.

oneDNN's AMX kernels (torch 2.13, Sapphire Rapids) read a bfloat16 row beyond an odd number of columns and multiply what
lies there by zero: NaN, where a test has laid NaN around a view. They also pack the weight into scratch memory, which
looks like an allocation of ours. Without AMX the same tests mean the same on every machine.
"""

import os

import pytest

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@pytest.fixture(autouse=True)
def seeded():
    """Torch's generator where each test begins: a test draws the same numbers alone as after any others.

    TEST_SEED tries other numbers.
    """
    import torch

    torch.manual_seed(int(os.environ.get("TEST_SEED", "0")))


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
