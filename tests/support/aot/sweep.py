"""Every launch the shipped rules can ask for: the launchers run over a wide sweep of problems, one launch of each
kind is kept.

Two launches are of one kind when they agree in the kernel, every compile-time argument, warps, stages and the dtypes
they read; kinds that differ only in dropout, bias and the adapters' dtype share a configuration. `shipped` has every
kind, `chosen` those of each configuration that tell most: the one with most to hold in registers, and at the
benchmarks' shapes the plainest one too.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from aot.pretend import Launch, pretend

from fastlora.kernels import configs, expand, gemm, grads, shrink

META = torch.device("meta")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = (80, 90, 100)

# (M, N, K): the benchmark's, where the code is judged; then small, short and skinny ones.
SHAPES = [
    (8192, 4096, 4096),
    (8192, 14336, 4096),
    (8192, 1024, 4096),
    (2048, 1024, 1024),
    (1024, 1024, 1024),
    (512, 1024, 1024),
    (200, 1024, 768),
    (64, 256, 128),
    (64, 32, 64),
    (1, 4096, 4096),
]
RANKS = (16, 1, 8, 32, 48, 64, 128, 256, 512)
# (of x, of the adapters, of S and dS): fp32 adapters are cast under autocast, and keep their digits otherwise.
DTYPES = [(BF16, BF16, BF16), (BF16, FP32, BF16), (BF16, FP32, FP32), (FP32, FP32, FP32)]


def is_pinned() -> bool:
    """Whether this is the Triton of constraints.txt. On others only the benchmarks' shapes are compiled, for Hopper:
    a tenth of the time."""
    pinned = (Path(__file__).resolve().parents[3] / "constraints.txt").read_text()
    return re.search(rf"^triton=={re.escape(triton.__version__)}\b", pinned, re.MULTILINE) is not None


@dataclass(frozen=True)
class Problem:
    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    s_dtype: torch.dtype
    dropout: bool
    special: str = ""  # what sets it apart from the sweep, if anything: compiled in any case

    def tensor(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype or self.dtype, device=META)

    def adapter(self, rows: int, columns: int) -> torch.Tensor:
        return self.tensor(rows, columns, self.adapter_dtype)

    def s(self) -> torch.Tensor:
        return self.tensor(self.m, self.r, self.s_dtype)

    def seed(self) -> dict:
        return {"seed": torch.empty(1, dtype=torch.int64, device=META), "dropout_p": 0.1} if self.dropout else {}


def problems() -> Iterator[Problem]:
    for dtypes, dropout, r, shape in itertools.product(DTYPES, (False, True), RANKS, SHAPES):
        yield Problem(*shape, r, *dtypes, dropout)
    for r in (8, 32, 64):  # no size is a multiple of 16: no row is aligned, and no run-time size is known to divide
        yield Problem(1000, 1001, 1003, r, BF16, BF16, BF16, dropout=False, special="unaligned")
        yield Problem(1000, 1001, 1003, r, BF16, FP32, FP32, dropout=True, special="unaligned, fp32 adapters")
    yield Problem(8192, 4096, 4096, 16, FP16, FP16, FP16, dropout=True, special="fp16")
    for r in (16, 32, 64, 128):  # the parts of fp32 adapters are others beside fp16
        yield Problem(8192, 4096, 4096, r, FP16, FP32, FP32, dropout=True, special="fp16, fp32 adapters")
    for shape in (SHAPES[0], (64, 256, 128)):
        yield Problem(*shape, 16, FP32, FP32, FP32, dropout=True, special="tf32")


def _workspace(size: int) -> torch.Tensor | None:
    return torch.empty(size, dtype=FP32, device=META) if size else None


def launch_shrink(p: Problem) -> None:
    x, a = p.tensor(p.m, p.k), p.adapter(p.r, p.k)
    shrink.shrink(x, a, p.s(), _workspace(shrink.shrink_workspace(x, a)), **p.seed())


def launch_expand(p: Problem) -> None:
    """Forward with a bias and no mask, backward through A's transposed view with one."""
    s = p.s()
    if p.dropout:
        expand.expand(s, p.adapter(p.r, p.k).t(), p.tensor(p.m, p.k), **p.seed())
    else:
        expand.expand(s, p.adapter(p.n, p.r), p.tensor(p.m, p.n), alpha=2.0, bias=p.tensor(1, p.n)[0])


def launch_weight_grad(p: Problem) -> None:
    x, g, out = p.tensor(p.m, p.k), p.s(), p.adapter(p.r, p.k)
    grads.weight_grad(x, g, out.t(), _workspace(grads.weight_grad_workspace(x, p.r)), **p.seed())


def launch_ds_and_db(p: Problem) -> None:
    dy, b, s = p.tensor(p.m, p.n), p.adapter(p.n, p.r), p.s()
    workspace = _workspace(grads.ds_and_db_workspace(dy, b))
    grads.ds_and_db(dy, b, s, torch.empty_like(s), torch.empty_like(b), workspace, scaling=2.0)


def launch_forward_gemm(p: Problem) -> None:
    x, w, y, s, b = p.tensor(p.m, p.k), p.tensor(p.n, p.k), p.tensor(p.m, p.n), p.s(), p.adapter(p.n, p.r)
    gemm.forward_gemm(x, w, p.tensor(1, p.n)[0] if p.dropout else None, s, b, y, 2.0)


def may_be_inside(r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool) -> bool:
    """Whether some N lets the rule `configs.s_inside` have S computed inside the GEMM: a narrow one, if any."""
    return configs.s_inside(16, r, dtype, adapter_dtype, 0.1 if dropout else 0.0)


def launch_forward_gemm_with_s(p: Problem) -> None:
    if may_be_inside(p.r, p.dtype, p.adapter_dtype, p.dropout):
        x, w, y, s = p.tensor(p.m, p.k), p.tensor(p.n, p.k), p.tensor(p.m, p.n), p.tensor(p.m, p.r)
        gemm.forward_gemm_with_s(x, w, None, p.adapter(p.r, p.k), p.adapter(p.n, p.r), y, s, 2.0)


def launch_input_grad_gemm(p: Problem) -> None:
    dy, w, dx, ds = p.tensor(p.m, p.n), p.tensor(p.n, p.k), p.tensor(p.m, p.k), p.s()
    gemm.input_grad_gemm(dy, w, ds, p.adapter(p.r, p.k), dx, **p.seed())


LAUNCHERS: list[Callable[[Problem], None]] = [
    launch_shrink,
    launch_expand,
    launch_weight_grad,
    launch_ds_and_db,
    launch_forward_gemm,
    launch_forward_gemm_with_s,
    launch_input_grad_gemm,
]


LIGHT_FLAGS = ("DROPOUT", "WIDE", "DROP_X", "DROP_LOW_RANK", "HAS_BIAS")


@dataclass(frozen=True)
class Kind:
    """One kind of launch, with the first launch of it that was met."""

    problem: Problem
    launch: Launch

    @property
    def special(self) -> str:
        return self.problem.special

    @property
    def headline(self) -> bool:
        """Whether it was met at the shapes and the rank that the benchmarks report."""
        return (self.problem.m, self.problem.r) == (8192, 16)

    @property
    def constants(self) -> dict[str, object]:
        """The arguments that are compile-time ones by declaration: a size that happens to be 1 is none."""
        names = {param.name for param in self.launch.kernel.params if param.is_constexpr}
        return {name: value for name, value in self.launch.constants().items() if name in names}

    @property
    def reads(self) -> tuple[str, ...]:
        """Types of the tensors that are read: what is written may be an fp32 partial or the result, a matter of one
        cast."""
        return tuple(
            str(ty)
            for name, ty in self.launch.signature.items()
            if str(ty).startswith(("*", "tensordesc")) and not name.startswith(("out_", "ds_", "db_"))
        )

    @property
    def key(self) -> tuple:
        options = self.launch.options
        return (
            self.launch.name,
            self.special,
            *self.constants.items(),
            self.reads,
            options["num_warps"],
            options["num_stages"],
        )

    @property
    def configuration(self) -> tuple:
        sizes = {name: value for name, value in self.constants.items() if name not in LIGHT_FLAGS}
        options = self.launch.options
        return (
            self.launch.name,
            self.special,
            *sizes.items(),
            self.reads[0],
            options["num_warps"],
            options["num_stages"],
        )

    @property
    def burden(self) -> tuple[int, int]:
        """How much the flags ask for beside the configuration: masks and biases, then casts."""
        return sum(self.constants.get(flag) is True for flag in LIGHT_FLAGS), len(set(self.reads))

    @property
    def kernel(self) -> str:
        return self.launch.name.strip("_").removesuffix("_kernel")

    def describe(self) -> str:
        """The configuration in a table's words: block sizes, flags that are on, "split" where programs add their
        parts, warps and stages, dtypes."""
        words = []
        for name, value in self.constants.items():
            if value is True and name != "HAS_BIAS":
                words.append(name.lower())
            elif isinstance(value, int) and not isinstance(value, bool):
                words.append(name.removeprefix("BLOCK_").lower() + f"{value}")
        words += ["bias"] * (self.launch.signature.get("bias_ptr", "constexpr") != "constexpr")
        words += ["split"] * ("*i32" in self.reads)  # counters: how many parts of a block have arrived
        words += [f"warps{self.launch.options['num_warps']}", f"stages{self.launch.options['num_stages']}"]
        words.append("+".join(dict.fromkeys(re.findall(r"bf16|fp16|fp32", " ".join(self.reads)))))
        return " ".join(words + [self.special] * bool(self.special))


@functools.cache
def shipped(arch: int) -> tuple[Kind, ...]:
    """One launch of every kind that the launchers ask for on `arch`, in the sweep's order."""
    kinds: dict[tuple, Kind] = {}
    with pretend(arch) as launches:
        for problem in problems():
            precision = "tf32" if problem.special == "tf32" else "ieee"
            for launcher in LAUNCHERS:
                launches.clear()
                with mock.patch.object(configs, "input_precision", lambda dtype, precision=precision: precision):
                    launcher(problem)
                for launch in launches:
                    kind = Kind(problem, launch)
                    kinds.setdefault(kind.key, kind)
    return tuple(kinds.values())


@functools.cache
def chosen(arch: int) -> tuple[Kind, ...]:
    """The heaviest kind of every configuration on `arch`, and the plainest of the benchmarks': what the tests compile
    each time."""
    groups: dict[tuple, list[Kind]] = {}
    for kind in shipped(arch):
        groups.setdefault(kind.configuration, []).append(kind)
    picked = []
    for group in groups.values():
        picked.append(max(group, key=lambda kind: kind.burden))
        if group[0].headline:
            picked.append(min(group, key=lambda kind: kind.burden))
    return tuple({kind.key: kind for kind in picked}.values())


def headlines(arch: int) -> tuple[Kind, ...]:
    """What `chosen` has at the benchmarks' shapes and rank."""
    return tuple(kind for kind in chosen(arch) if kind.headline)
