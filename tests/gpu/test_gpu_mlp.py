"""The MLP's kernels on a GPU, against fp64, with outputs poisoned by NaN, and the op. Never run so far."""

import contracts
import pytest
import torch

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGE, ODD, ROW = (2048, 5632), (777, 1001), (1, 4096)  # M, K
CASES = [("silu", BF16, BF16, size, 16, 0.1) for size in (LARGE, ODD, ROW)]
CASES += [(activation, BF16, FP32, LARGE, 64, 0.0) for activation in ("gelu", "gelu_tanh", "relu")]
CASES += [("silu", FP16, FP16, ODD, 16, 0.0), ("gelu", FP32, FP32, ODD, 16, 0.1), ("silu", FP32, FP32, ODD, 8, 0.0)]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_activation_and_its_gradients(case, gated):
    from mlp_kernels import Problem, check  # Triton exists on Linux only

    activation, dtype, adapter_dtype, (m, k), r, p = case
    check(Problem(m, k, r, dtype, adapter_dtype, gated, p, "offset", "cuda"), activation)


class TestMlp(contracts.Mlp):
    places = contracts.ON_A_GPU
    dtypes = ((FP32, FP32),)  # of half precision the kernels by themselves, and as near as ATen
    self_checks = tuple(((dtype, FP32), dropout) for dtype in (BF16, FP32) for dropout in (False, True))
    sizes = {  # noqa: RUF012
        "silu": {"activation": "silu", "gated": True, "shape": (2, 500), "k": 1024, "n": 2816, "out": 1024, "r": 16},
        "gelu, plain": {"activation": "gelu", "gated": False, "shape": (333,), "k": 1000, "n": 1001, "out": 500},
    }
