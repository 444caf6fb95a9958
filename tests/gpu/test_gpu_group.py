# pyright: reportArgumentType=false

"""Groups of layers on a GPU: `lora_group` against fp64. Never run so far."""

import contracts
import pytest

pytestmark = pytest.mark.gpu


class TestGroup(contracts.Group):
    places = contracts.ON_A_GPU
    sizes = {  # noqa: RUF012
        "qkv": {"shape": (777,), "k": 1000, "sizes": (4096, 1024, 1024), "ranks": (16, 16, 16)},
        "gate and up": {"shape": (777,), "k": 1000, "sizes": (1000, 1000), "ranks": (8, 64)},
        "five": {"shape": (7, 111), "k": 1000, "sizes": (64,) * 5, "ranks": (4,) * 5},
    }
