"""`lora_linear`: the checks and the choice of path. The mathematics is in the backends next to it."""

from __future__ import annotations

from torch import Tensor

from .. import call, reference
from ..call import Adapter, cast_for_autocast, check_call, check_one_dtype, check_probability, takes_fused_path
from . import autograd


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A linear layer with a low-rank adapter, computed in one piece: y = x W0ᵀ + b + s·(drop(x) Aᵀ) Bᵀ.

    Equivalent to:

        s = F.linear(F.dropout(x, dropout_p, training), lora_A)
        y = F.linear(x, weight, bias) + scaling * F.linear(s, lora_B)

    Args:
        x: (..., K), at least 1-D, float32, float64, bfloat16 or float16, any strides.
        weight: (N, K), x's dtype (any float dtype under autocast), any strides: a Conv1D's weight goes in as
            `weight.t()`.
        lora_A: (r, K). lora_B: (N, r). Both of any float dtype: with float32 adapters on a half-precision base the
            low-rank path, S and every gradient of it are float32, without a float32 copy of x.
        scaling: s, a run-time number: alpha/r, or alpha/√r with rsLoRA (arXiv 2312.03732).
        bias: (N,) or None.
        dropout_p: probability, in [0, 1], of dropping an element of x on the low-rank path; used when `training`.
        backend: "auto", "triton", "cublas" or "torch"; one that cannot take the call falls down to the next.

    Returns:
        (..., N) in x's dtype (autocast's dtype under autocast). Differentiable once in x, weight, bias, lora_A and
        lora_B.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a probability outside [0, 1], an unknown
            backend.

    Examples:
        >>> x, weight = torch.randn(4, 32, 64), torch.randn(128, 64)
        >>> lora_A, lora_B = torch.randn(8, 64), torch.zeros(128, 8)
        >>> lora_linear(x, weight, lora_A, lora_B, scaling=2.0).shape
        torch.Size([4, 32, 128])

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685.
    """
    if not training:
        check_probability(dropout_p)
        dropout_p = 0.0
    adapter = Adapter(lora_A, lora_B, scaling, dropout_p)
    return fused_linear(x, weight, adapter, bias, backend)


def fused_linear(
    x: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None, backend: str, caller: str = "lora_linear"
) -> Tensor:
    lora_A, lora_B, scaling, dropout_p, _, _ = adapter
    if dropout_p == 0.0:
        y = autograd.known_call(x, weight, bias, lora_A, lora_B, scaling, backend)
        if y is not None:
            return y
    check_call(x, weight, adapter, bias, caller)
    narrow = call.autocast_enabled(x)
    if narrow:
        x, weight, bias = cast_for_autocast(x, weight, bias)
    check_one_dtype(x, weight, bias, caller)
    if weight.numel() == 0 or x.is_nested or not takes_fused_path(x, weight, bias, lora_A, lora_B):
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    return autograd.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, backend, narrow)
