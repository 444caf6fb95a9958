"""Repairs of Triton's interpreter, without which bf16 kernels cannot be tested on a CPU.

The interpreter keeps bf16 as uint16 bit patterns. In Triton 3.6.0, 3.7.1 and 3.9.0 alike
- `tl.dot` multiplies the bit patterns as if they were integers (a relative error of 1e10),
- arithmetic on bf16 adds and multiplies bit patterns,
- fp32 → bf16 truncates instead of rounding to nearest even, and bf16 ↔ fp16 or integers takes bit patterns for values
  (3.9 repairs bf16 ↔ fp16 of `tl.cast` with a rounding mode only).
And 3.6.0 alone cannot use a tensor as a loop bound with numpy ≥ 2.4 (`range(0, n)` raises TypeError).

`install` replaces the methods concerned by ones that compute on fp32 values and round the result once, which is what
the hardware does. test_bf16_repair.py fails without it.
"""

# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_installed = False


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bf16 bit patterns: a bf16 is the upper half of an fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bit patterns of values rounded to bf16, to nearest even; every NaN becomes the quiet one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> np.ndarray:
    return to_float32(handle.data) if _is_bfloat16(handle) else handle.data


def install() -> None:
    """Repair the interpreter of the running process. Calling it again does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _repair_casts()
    _repair_arithmetic()
    _repair_dot()
    _repair_loop_bounds()


def _repair_casts() -> None:
    stock_cast, stock_fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast(self, source, target_type):
        target = target_type.scalar
        if source.dtype.scalar == target or tl.bfloat16 not in (source.dtype.scalar, target):
            return stock_cast(self, source, target_type)
        if target == tl.bfloat16:
            return TensorHandle(to_bfloat16(source.data), target)
        widened = TensorHandle(to_float32(source.data), tl.float32)
        return widened if target == tl.float32 else stock_cast(self, widened, target_type)

    def fp_to_fp(self, source, target_type, rounding_mode):
        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if tl.bfloat16 in (source.dtype.scalar, target_type.scalar) and not toward_zero:
            return cast(self, source, target_type)
        return stock_fp_to_fp(self, source, target_type, rounding_mode)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(to_bfloat16(np.array([value])), tl.bfloat16)


def _repair_arithmetic() -> None:
    stock_binary, stock_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def binary(self, lhs, rhs, op):
        if not _is_bfloat16(lhs):
            return stock_binary(self, lhs, rhs, op)
        result = op(_values(lhs), _values(rhs))
        if result.dtype == bool:  # a comparison
            return TensorHandle(result, tl.int1)
        return TensorHandle(to_bfloat16(result), tl.bfloat16)

    def unary(self, operand, op):
        if not _is_bfloat16(operand):
            return stock_unary(self, operand, op)
        return TensorHandle(to_bfloat16(op(to_float32(operand.data))), tl.bfloat16)

    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.unary_op = unary


def _repair_dot() -> None:
    stock_dot = InterpreterBuilder.create_dot

    def widen(handle):
        if _is_bfloat16(handle):
            return TensorHandle(to_float32(handle.data), tl.float32)
        if handle.dtype.scalar == tl.float16:  # right as it is, but numpy multiplies fp16 without BLAS
            return TensorHandle(handle.data.astype(np.float32), tl.float32)
        return handle

    def dot(self, a, b, acc, *options):
        return stock_dot(self, widen(a), widen(b), acc, *options)

    InterpreterBuilder.create_dot = dot


def _repair_loop_bounds() -> None:
    stock_patch = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch
