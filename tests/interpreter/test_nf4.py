"""The four-bit dequantisation kernel, bit for bit against bitsandbytes' own on the CPU."""

import contracts
import torch

from fastlora.kernels.nf4 import DequantiseConfig, dequantise_4bit


class TestNf4(contracts.Nf4):
    def test_any_number_of_blocks_a_program(self):
        for elements in (64, 256, 1024):
            self.check(7, 200, config=DequantiseConfig(elements, 1))


def test_nothing_to_do():
    empty = torch.empty(0, dtype=torch.uint8)
    dequantise_4bit(empty, torch.zeros(16), torch.empty(0), torch.empty(0), 64)
