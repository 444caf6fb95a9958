"""AdaLoRA's importance kernels on a GPU, at a model's sizes. These tests have not run so far."""

import contracts

from fastlora.ops.importance import triton as importance_triton


class TestImportance(contracts.Importance):
    device = "cuda"
    implementation = importance_triton
    sizes = {  # noqa: RUF012
        "llama": [(12, 4096, 4096)] * 2 + [(12, 4096, 11008)] * 2 + [(12, 11008, 4096)],
        "odd": [(13, 1003, 777), (1, 5, 3), (130, 300, 1003)],
    }
