"""FLOPs, bytes and predicted time of every kernel, and of whole passes built from them.

The model: a kernel takes max(bytes / bandwidth, FLOPs / rate). Bytes are the compulsory ones (each operand read once,
each result written once, intermediates of a fused kernel not at all), so that a prediction is a floor, not a guess at
caches. What a compute-bound GEMM reads next to its own operands (the `C` of `addmm_`, a bias) is hidden behind its
arithmetic by the same rule.

Nothing here imports torch: the model is arithmetic on shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "bool": 1, "int64": 8}


@dataclass(frozen=True)
class Roof:
    """What a device can do at most: dense matrix FLOP/s and memory bytes/s."""

    flops: float
    bandwidth: float
    name: str = ""


# One H200, measured on random data: an 8192-cubed bf16 product, and a device-to-device copy counting reads and writes.
H200 = Roof(flops=790e12, bandwidth=4.3e12, name="H200 (790 TFLOP/s bf16, 4.3 TB/s)")


@dataclass(frozen=True)
class Problem:
    """One LoRA linear: x (M, K), weight (N, K), lora_A (r, K), lora_B (N, r); dtypes by name."""

    m: int
    n: int
    k: int
    r: int
    dtype: str = "bfloat16"
    adapter_dtype: str = "bfloat16"
    bias: bool = False
    dropout: float = 0.0

    @property
    def itemsize(self) -> int:
        return BYTES[self.dtype]

    def matrix(self, rows: int, cols: int, dtype: str | None = None) -> int:
        return rows * cols * BYTES[dtype or self.dtype]

    @property
    def x(self) -> int:
        return self.matrix(self.m, self.k)

    @property
    def y(self) -> int:
        return self.matrix(self.m, self.n)

    @property
    def weight(self) -> int:
        return self.matrix(self.n, self.k)

    @property
    def s(self) -> int:
        """S, in the wider of the two dtypes."""
        return self.matrix(self.m, self.r, max(self.dtype, self.adapter_dtype, key=BYTES.__getitem__))

    @property
    def lora_a(self) -> int:
        return self.matrix(self.r, self.k, self.adapter_dtype)

    @property
    def lora_b(self) -> int:
        return self.matrix(self.n, self.r, self.adapter_dtype)

    @property
    def bias_bytes(self) -> int:
        return self.matrix(1, self.n) if self.bias else 0


@dataclass(frozen=True)
class Step:
    """One kernel launch: its FLOPs and its compulsory bytes."""

    name: str
    flops: int
    bytes: int

    def time(self, roof: Roof) -> float:
        return max(self.bytes / roof.bandwidth, self.flops / roof.flops)

    def bound(self, roof: Roof) -> str:
        return "compute" if self.flops / roof.flops > self.bytes / roof.bandwidth else "memory"


def total_time(steps: list[Step], roof: Roof) -> float:
    """Predicted seconds of `steps`, run one after the other."""
    return sum(step.time(roof) for step in steps)


def _gemm(name: str, rows: int, cols: int, inner: int, nbytes: int) -> Step:
    return Step(name, 2 * rows * cols * inner, nbytes)


# The kernels of this project.
def shrink(p: Problem) -> Step:
    """S = drop(x) Aᵀ: reads x and A, writes S. The mask is computed, not read."""
    return _gemm("shrink", p.m, p.r, p.k, p.x + p.lora_a + p.s)


def expand(p: Problem) -> Step:
    """T = s·S Bᵀ (+ b): reads S, B and the bias, writes (M, N)."""
    return _gemm("expand", p.m, p.n, p.r, p.s + p.lora_b + p.bias_bytes + p.y)


def expand_dx(p: Problem) -> Step:
    """dX = drop′(dS A): reads dS and A, writes (M, K)."""
    return _gemm("expand_dx", p.m, p.k, p.r, p.s + p.lora_a + p.x)


def grad_s_and_b(p: Problem) -> Step:
    """dS = s·dY B and dB = s·dYᵀ S in one pass over dY."""
    return Step("grad_s_and_b", 4 * p.m * p.n * p.r, p.y + 2 * p.s + 2 * p.lora_b)


def grad_a(p: Problem) -> Step:
    """dA = dSᵀ drop(x): reads dS and x, writes dA."""
    return _gemm("grad_a", p.r, p.k, p.m, p.s + p.x + p.lora_a)


def gemm_forward(p: Problem) -> Step:
    """y = x W0ᵀ + b + s·S Bᵀ as one GEMM with a rank-r step."""
    return Step("gemm_forward", 2 * p.m * p.n * (p.k + p.r), p.x + p.weight + p.s + p.lora_b + p.bias_bytes + p.y)


def gemm_forward_s_inside(p: Problem, block_n: int = 256) -> Step:
    """The same with S = drop(x) Aᵀ computed inside: every column of tiles computes it again, one of them stores it."""
    columns = -(-p.n // block_n)
    flops = 2 * p.m * p.n * (p.k + p.r) + 2 * p.m * p.k * p.r * columns
    return Step("gemm_forward_s_inside", flops, p.x + p.weight + p.lora_a + p.s + p.lora_b + p.bias_bytes + p.y)


def gemm_backward(p: Problem) -> Step:
    """dX = dY W0 + drop′(dS A) as one GEMM with a rank-r step and the mask."""
    return Step("gemm_backward", 2 * p.m * p.k * (p.n + p.r), p.y + p.weight + p.s + p.lora_a + p.x)


KERNELS: dict[str, Callable[[Problem], Step]] = {
    "shrink": shrink,
    "expand": expand,
    "expand_dx": expand_dx,
    "grad_s_and_b": grad_s_and_b,
    "grad_a": grad_a,
    "gemm_forward": gemm_forward,
    "gemm_forward_s_inside": gemm_forward_s_inside,
    "gemm_backward": gemm_backward,
}


# The frozen layer, and the passes of each contender. A pass is a pair (forward steps, backward steps).
Passes = tuple[list[Step], list[Step]]


def frozen(p: Problem) -> Passes:
    """The floor: y = x W0ᵀ (+ b) and dX = dY W0."""
    forward = _gemm("base forward", p.m, p.n, p.k, p.x + p.weight + p.bias_bytes + p.y)
    backward = _gemm("base dX", p.m, p.k, p.n, p.y + p.weight + p.x)
    return [forward], [backward]


def eager(p: Problem) -> Passes:
    """base(x) + lora_B(lora_A(drop(x))) * s as autograd runs it, PEFT's order: one kernel per operator.

    Adapters of another dtype cast x up, the sum down again, and both gradients on their way back.
    """
    (base,), (base_dx,) = frozen(p)
    mixed = p.adapter_dtype != p.dtype
    x, y, s = (p.matrix(p.m, cols, p.adapter_dtype) for cols in (p.k, p.n, p.r))
    mask = p.matrix(p.m, p.k, "bool")
    drop = bool(p.dropout)
    forward = [
        base,
        *[Step("cast x up", 0, p.x + x)] * mixed,
        *[Step("dropout", 0, 2 * x + mask)] * drop,
        _gemm("lora_A", p.m, p.r, p.k, x + p.lora_a + s),
        _gemm("lora_B", p.m, p.n, p.r, s + p.lora_b + y),
        Step("scale", 0, 2 * y),
        Step("add", 0, p.y + 2 * y),
        *[Step("cast y down", 0, y + p.y)] * mixed,
    ]
    backward = [
        *[Step("cast dY up and down", 0, 2 * (y + p.y))] * mixed,
        Step("scale dY", 0, 2 * y),
        _gemm("dS", p.m, p.r, p.n, y + p.lora_b + s),
        _gemm("dB", p.n, p.r, p.m, y + s + p.lora_b),
        _gemm("dS A", p.m, p.k, p.r, s + p.lora_a + x),
        _gemm("dA", p.r, p.k, p.m, s + x + p.lora_a),
        *[Step("dropout backward", 0, 2 * x + mask)] * drop,
        *[Step("cast dX down", 0, x + p.x)] * mixed,
        base_dx,
        Step("accumulate dX", 0, 3 * p.x),
    ]
    return forward, backward


def eager_autocast(p: Problem) -> Passes:
    """Eager with fp32 adapters under autocast: x is cast up by the layer and down by autocast, and its gradient
    likewise."""
    forward, backward = eager(replace(p, adapter_dtype=p.dtype))
    there_and_back = 2 * (p.x + p.matrix(p.m, p.k, "float32"))
    return [*forward, Step("cast x up and down", 0, there_and_back)], [
        *backward,
        Step("cast dX up and down", 0, there_and_back),
    ]


def addmm(p: Problem) -> Passes:
    """A hand-written autograd over `addmm_` in Unsloth's order: S and dY·B computed twice, nothing saved but x."""
    (base,), (base_dx,) = frozen(p)
    shrink_x = _gemm("S", p.m, p.r, p.k, p.x + p.lora_a + p.s)
    d_s = _gemm("dS", p.m, p.r, p.n, p.y + p.lora_b + p.s)
    forward = [base, shrink_x, _gemm("addmm_ S Bᵀ", p.m, p.n, p.r, p.s + p.lora_b + 2 * p.y)]
    backward = [
        shrink_x,
        _gemm("dB", p.n, p.r, p.m, p.y + p.s + p.lora_b),
        d_s,
        _gemm("dA", p.r, p.k, p.m, p.s + p.x + p.lora_a),
        base_dx,
        d_s,
        _gemm("addmm_ dS A", p.m, p.k, p.r, p.s + p.lora_a + 2 * p.x),
    ]
    return forward, backward


def cublas(p: Problem) -> Passes:
    """T = s·S Bᵀ (+ b), then `T.addmm_(x, W0ᵀ)`; dX = drop′(dS A), then `dX.addmm_(dY, W0)`."""
    forward = [shrink(p), expand(p), _gemm("addmm_ x W0ᵀ", p.m, p.n, p.k, p.x + p.weight + 2 * p.y)]
    base_dx = _gemm("addmm_ dY W0", p.m, p.k, p.n, p.y + p.weight + 2 * p.x)
    return forward, [grad_s_and_b(p), expand_dx(p), base_dx, grad_a(p)]


def triton(p: Problem) -> Passes:
    """S, then one GEMM with a rank-r step; dS and dB in one pass, one GEMM with a rank-r step, dA."""
    return [shrink(p), gemm_forward(p)], [grad_s_and_b(p), gemm_backward(p), grad_a(p)]


def triton_s_inside(p: Problem) -> Passes:
    """The same with S computed inside the forward GEMM."""
    return [gemm_forward_s_inside(p)], triton(p)[1]


PASSES: dict[str, Callable[[Problem], Passes]] = {
    "frozen": frozen,
    "eager": eager,
    "peft": eager,
    "eager_autocast": eager_autocast,
    "addmm": addmm,
    "cublas": cublas,
    "triton": triton,
    "triton_s_inside": triton_s_inside,
}


def useful_flops(p: Problem, direction: str) -> int:
    """FLOPs any implementation must do: two frozen GEMMs' worth and the rank-r products, each once."""
    forward = 2 * p.m * (p.n * p.k + p.r * (p.n + p.k))
    backward = 2 * p.m * (p.n * p.k + 2 * p.r * (p.n + p.k))
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def compulsory_bytes(p: Problem, direction: str) -> int:
    """Bytes any implementation must move: each argument read once, each result written once."""
    forward = p.x + p.weight + p.bias_bytes + p.lora_a + p.lora_b + p.y
    backward = p.y + p.x + p.weight + 2 * (p.lora_a + p.lora_b) + p.x
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def overhead(name: str, p: Problem, roof: Roof, gemm_efficiency: float = 1.0) -> float:
    """Predicted forward + backward time over the frozen layer's, as a fraction: 0.07 is 7 % more.

    `gemm_efficiency` is how fast the contender's own large GEMMs run next to the frozen layer's.
    """
    floor = sum(total_time(part, roof) for part in frozen(p))
    seconds = 0.0
    for step in (step for part in PASSES[name](p) for step in part):
        own_gemm = step.name.startswith("gemm_")
        seconds += step.time(roof) / (gemm_efficiency if own_gemm else 1.0)
    return seconds / floor - 1.0
