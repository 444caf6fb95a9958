"""What every launcher needs: dtypes, the largest rank, a workspace, the device."""

from __future__ import annotations

import contextlib

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


MAX_RANK = 512  # what the kernels are compiled and tested for


# Triton decides when it is imported: with TRITON_INTERPRET=1 its functions run as Python on CPU tensors.
INTERPRETED = not isinstance(tl.cdiv, JITFunction)


def new_workspace(like: Tensor, size: int) -> Tensor | None:
    return like.new_empty(size, dtype=torch.float32) if size else None


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
