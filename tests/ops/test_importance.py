"""AdaLoRA's importance in ATen; what an allocator makes of it: tests/variants/test_adalora.py."""

import contracts


class TestImportance(contracts.Importance):
    dtypes = (*contracts.Importance.dtypes, contracts.FP64)
