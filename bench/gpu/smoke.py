"""Every kernel family at its real shape, a line each: `python -m bench smoke`. The first stage of bench/gpu.sh.

A line has the largest relative error against fp64 on sampled rows or columns (outputs are NaN before), whether a second
run gave the same bits, the median time in a CUDA graph, GB/s or TFLOP/s, and what counting predicts for an H200. Then
the ceilings, the first-use checks, and the host's time and an eager training loop's of one layer next to F.linear and
PEFT. Exit status: 0 where all passed, 1 where some failed, 3 where no kernel did: nothing that follows would help then.

Kernels are compiled first, by `--jobs` processes. One set of tensors an item: what fits the L2 may be found there.
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.functional import lora_linear_log_probs
from fastlora.kernels import dora, group, mlp, segment_grads, segments
from fastlora.kernels.dropout import new_seed, reference_keep_mask, threshold_and_scale
from fastlora.kernels.expand import expand
from fastlora.kernels.gemm import forward_gemm, forward_gemm_with_s, input_grad_gemm
from fastlora.kernels.grads import ds_and_db, ds_and_db_workspace, weight_grad, weight_grad_workspace
from fastlora.kernels.nf4 import dequantise_4bit
from fastlora.kernels.segment_factors import expert_factors
from fastlora.kernels.segment_plan import Routed
from fastlora.kernels.shrink import shrink, shrink_workspace
from fastlora.ops.dora import dora as dora_op
from fastlora.ops.experts import experts as experts_op
from fastlora.ops.group import group as group_op
from fastlora.ops.head import head as head_op
from fastlora.ops.lora import choice
from fastlora.ops.mixed import mixed as mixed_op
from fastlora.ops.mlp import mlp as mlp_op
from fastlora.runtime.trust import module_or_reason

from ..harness import contenders, machine
from ..harness.counting import H200, Problem
from ..harness.runner import command
from ..harness.timing import Summary, timer_for
from ..harness.turns import write_json

BF16, FP32 = torch.bfloat16, torch.float32
SAMPLES = 64  # rows or columns compared with fp64
SCALING, DROPOUT = 2.0, 0.1
Check = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]  # (what, got, wanted in fp64)


@dataclass
class Sizes:
    m: int = 8192
    n: int = 4096
    k: int = 4096
    r: int = 16
    wide: int = 14336  # of an MLP
    words: int = 151_936
    tokens: int = 2048  # of a head
    experts: tuple[int, ...] = (128, 8, 1536, 2048)  # number, each token's, N, K
    loop: tuple[int, ...] = (512, 2048, 8192)  # M of the eager loop


TINY = Sizes(48, 40, 56, 4, 48, 50, 9, (4, 2, 24, 40), (16,))


@dataclass
class Item:
    """What is run, what it writes, how that is compared, and what it moves at least."""

    run: Callable[[], object]
    outs: Sequence[Tensor]
    checks: list[Check]
    bytes: int
    flops: int = 0


@dataclass
class Case:
    """One family's tensors: `t` by name, made on first use; dropout's mask in fp64."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float
    keep: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.seed = new_seed(self.device) if self.p else None
        self.dropout = {"seed": self.seed, "dropout_p": self.p}
        self.wide = self.adapter_dtype.itemsize > self.dtype.itemsize

    def normal(self, *shape: int, scale: float = 1.0, adapter: bool = False) -> Tensor:
        values = torch.empty(shape, device=self.device).normal_(generator=self.generator).mul_(scale)
        return values.to(self.adapter_dtype if adapter else self.dtype)

    def out(self, *shape: int, adapter: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or (self.adapter_dtype if adapter else self.dtype)
        return torch.full(shape, math.nan, device=self.device, dtype=dtype)

    def workspace(self, size: int) -> Any:
        return self.out(size, dtype=FP32) if size else None

    def a(self, r: int | None = None, k: int | None = None) -> Tensor:
        k = k or self.sizes.k
        return self.normal(r or self.sizes.r, k, scale=k**-0.5, adapter=True)

    def b(self) -> Tensor:
        return self.normal(self.sizes.n, self.sizes.r, scale=0.25, adapter=True)

    def some(self, count: int) -> Tensor:
        """Sampled rows or columns, the first and the last among them."""
        picked = torch.randint(count, (SAMPLES,), device=self.device, generator=self.generator)
        picked[0], picked[-1] = 0, count - 1
        return picked

    def mask(self, m: int, k: int) -> Tensor:
        """drop's mask times its scale (M, K), or ones."""
        if self.seed is None:
            return torch.ones(1, 1, device=self.device).expand(m, k)
        if (m, k) not in self.keep:
            self.keep[m, k] = reference_keep_mask(self.seed, m, k, self.p).float() * threshold_and_scale(self.p)[1]
        return self.keep[m, k]

    def dropped(self, x: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        picked = slice(None) if rows is None else rows, slice(None) if columns is None else columns
        return x[picked].double() * self.mask(*x.shape)[picked].double()


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# Families: each makes items from a case. One that takes no dropout is made without it only.
def shrinks(c: Case) -> dict[str, Item]:
    z = c.sizes
    x, a, s, rows = c.normal(z.m, z.k), c.a(), c.out(z.m, z.r, adapter=True), c.some(z.m)
    space = c.workspace(shrink_workspace(x, a))
    check = ("S", lambda: s[rows], lambda: c.dropped(x, rows) @ a.double().t())
    run = lambda: shrink(x, a, s, space, **c.dropout)  # noqa: E731
    return {"shrink": Item(run, [s], [check], nbytes(x, a, s), 2 * z.m * z.k * z.r)}


def expands(c: Case) -> dict[str, Item]:
    z = c.sizes
    ds, a, dx, rows = c.normal(z.m, z.r, adapter=True), c.a(), c.out(z.m, z.k), c.some(z.m)
    wanted = lambda: ds[rows].double() @ a.double() * c.mask(z.m, z.k)[rows]  # noqa: E731
    run = lambda: expand(ds, a.t(), dx, **c.dropout)  # noqa: E731
    return {"expand": Item(run, [dx], [("dX", lambda: dx[rows], wanted)], nbytes(ds, a, dx), 2 * z.m * z.k * z.r)}


def gradients(c: Case) -> dict[str, Item]:
    z = c.sizes
    x, dy, b, s = c.normal(z.m, z.k), c.normal(z.m, z.n), c.b(), c.normal(z.m, z.r, adapter=True)
    ds, db, da = c.out(z.m, z.r, adapter=True), c.out(z.n, z.r, adapter=True), c.out(z.r, z.k, adapter=True)
    space, other = c.workspace(ds_and_db_workspace(dy, b)), c.workspace(weight_grad_workspace(x, z.r))
    rows, columns, outputs = c.some(z.m), c.some(z.k), c.some(z.n)
    checks = [
        ("dS", lambda: ds[rows], lambda: SCALING * dy[rows].double() @ b.double()),
        ("dB", lambda: db[outputs], lambda: SCALING * dy[:, outputs].double().t() @ s.double()),
    ]
    grad_a = ("dA", lambda: da[:, columns], lambda: s.double().t() @ c.dropped(x, columns=columns))
    found = {
        "weight_grad": Item(
            lambda: weight_grad(x, s, da.t(), other, **c.dropout), [da], [grad_a], nbytes(x, s, da), 2 * z.m * z.k * z.r
        )
    }
    if not c.p:
        run = lambda: ds_and_db(dy, b, s, ds, db, space, scaling=SCALING)  # noqa: E731
        found["ds_and_db"] = Item(run, [ds, db], checks, nbytes(dy, b, s, ds, db), 4 * z.m * z.n * z.r)
    return found


def gemms(c: Case) -> dict[str, Item]:
    z = c.sizes
    x, w, a, b = c.normal(z.m, z.k), c.normal(z.n, z.k, scale=z.k**-0.5), c.a(), c.b()
    dy, ds, dx = c.normal(z.m, z.n), c.normal(z.m, z.r, adapter=True), c.out(z.m, z.k)
    rows, flops = c.some(z.m), 2 * z.m * z.n * (z.k + z.r)
    wanted = lambda: dy[rows].double() @ w.double() + ds[rows].double() @ a.double() * c.mask(z.m, z.k)[rows]  # noqa: E731
    run = lambda: input_grad_gemm(dy, w, ds, a, dx, **c.dropout)  # noqa: E731
    found = {"gemm dX": Item(run, [dx], [("dX", lambda: dx[rows], wanted)], nbytes(dy, w, dx), flops)}
    if not c.p:
        s, y, inside = c.normal(z.m, z.r, adapter=True), c.out(z.m, z.n), c.out(z.m, z.r)
        frozen = lambda: x[rows].double() @ w.double().t()  # noqa: E731
        y_of = lambda: frozen() + SCALING * s[rows].double() @ b.double().t()  # noqa: E731
        run_y = lambda: forward_gemm(x, w, None, s, b, y, SCALING)  # noqa: E731
        found["gemm y"] = Item(run_y, [y], [("y", lambda: y[rows], y_of)], nbytes(x, w, y), flops)
        if not c.wide and c.dtype is not FP32:
            whole = lambda: frozen() + SCALING * x[rows].double() @ a.double().t() @ b.double().t()  # noqa: E731
            run_s = lambda: forward_gemm_with_s(x, w, None, a, b, y, inside, SCALING)  # noqa: E731
            check = ("y", lambda: y[rows], whole)
            found["gemm y, S inside"] = Item(run_s, [y, inside], [check], nbytes(x, w, y), flops)
    return found


def groups(c: Case) -> dict[str, Item]:
    z = c.sizes
    x, lora_As = c.normal(z.m, z.k), [c.a() for _ in range(3)]
    ss, dss = [c.out(z.m, z.r, adapter=True) for _ in lora_As], [c.normal(z.m, z.r, adapter=True) for _ in lora_As]
    das, dx, rows, columns = [c.out(z.r, z.k, adapter=True) for _ in lora_As], c.out(z.m, z.k), c.some(z.m), c.some(z.k)
    given = {"seeds": [c.seed] * 3, "dropout_ps": [c.p] * 3}
    spaces = [c.workspace(group.shrink_workspace(x, lora_As)), c.workspace(group.weight_grad_workspace(x, [z.r] * 3))]
    total = lambda: sum(s[rows].double() @ a.double() for s, a in zip(dss, lora_As)) * c.mask(z.m, z.k)[rows]  # noqa: E731
    flops = 6 * z.m * z.k * z.r
    return {
        "group shrink": Item(
            lambda: group.group_shrink(x, lora_As, ss, spaces[0], **given),
            ss,
            [("S", lambda: ss[2][rows], lambda: c.dropped(x, rows) @ lora_As[2].double().t())],
            nbytes(x, *lora_As, *ss),
            flops,
        ),
        "group weight_grad": Item(
            lambda: group.group_weight_grad(x, dss, [d.t() for d in das], spaces[1], **given),
            das,
            [("dA", lambda: das[2][:, columns], lambda: dss[2].double().t() @ c.dropped(x, columns=columns))],
            nbytes(x, *dss, *das),
            flops,
        ),
        "group expand": Item(
            lambda: group.group_expand(dss, [a.t() for a in lora_As], dx, **given),
            [dx],
            [("dX", lambda: dx[rows], total)],
            nbytes(dx, *dss, *lora_As),
            flops,
        ),
    }


def activations(c: Case) -> dict[str, Item]:
    z = c.sizes
    gate, up, dh = (c.normal(z.m, z.wide) for _ in range(3))
    a, s, ds = c.a(k=z.wide), c.out(z.m, z.r, adapter=True), c.normal(z.m, z.r, adapter=True)
    h, dgate, dup, da = c.out(z.m, z.wide), c.out(z.m, z.wide), c.out(z.m, z.wide), c.out(z.r, z.wide, adapter=True)
    rows, columns = c.some(z.m), c.some(z.wide)
    spaces = [c.workspace(mlp.activate_workspace(gate, a)), c.workspace(mlp.activate_backward_workspace(gate, z.r))]
    every: Any = slice(None)
    exact_h = lambda i, j=every: F.silu(gate[i, j].double()) * up[i, j].double()  # noqa: E731
    masked = lambda i, j=every: c.mask(z.m, z.wide)[i, j].double()  # noqa: E731
    rounded = lambda i, j=every: exact_h(i, j).to(c.dtype).double() * masked(i, j)  # noqa: E731
    inner = lambda: dh[rows].double() + ds[rows].double() @ a.double() * masked(rows)  # noqa: E731
    return {
        "activate": Item(
            lambda: mlp.activate(gate, up, "silu", h, a, s, spaces[0], **c.dropout),
            [h, s],
            [
                ("h", lambda: h[rows], lambda: exact_h(rows)),
                ("S", lambda: s[rows], lambda: rounded(rows) @ a.double().t()),
            ],
            nbytes(gate, up, h, a, s),
        ),
        "activate_backward": Item(
            lambda: mlp.activate_backward(dh, ds, gate, up, "silu", a, dgate, dup, da, spaces[1], **c.dropout),
            [dgate, dup, da],
            [
                ("dup", lambda: dup[rows], lambda: inner() * F.silu(gate[rows].double())),
                ("dA", lambda: da[:, columns], lambda: ds.double().t() @ rounded(every, columns)),
            ],
            nbytes(dh, ds, gate, up, a, dgate, dup, da),
        ),
    }


def doras(c: Case) -> dict[str, Item]:
    z = c.sizes
    w, a, b, zs, dy = c.normal(z.n, z.k, scale=z.k**-0.5), c.a(), c.b(), c.normal(z.m, z.n), c.normal(z.m, z.n)
    norm, magnitude = c.out(z.n, dtype=FP32), c.normal(z.n).float() + 3
    length, y, dz, sums = c.normal(z.n).float().abs() + 1, c.out(z.m, z.n), c.out(z.m, z.n), c.out(2, z.n, dtype=FP32)
    rows, outputs, space = c.some(z.m), c.some(z.n), c.workspace(dora.norm_workspace(w, a))
    other, ratio = c.workspace(dora.scale_backward_workspace(dy)), (magnitude / length).double()
    exact = lambda: (w[outputs].double() + SCALING * b[outputs].double() @ a.double()).norm(dim=1)  # noqa: E731
    summed = lambda: (dy[:, outputs].double() * zs[:, outputs].double()).sum(0) / length[outputs]  # noqa: E731
    return {
        "dora_norm": Item(
            lambda: dora.dora_norm(w, a, b, SCALING, norm, space),
            [norm],
            [("norm", lambda: norm[outputs], exact)],
            nbytes(w, a, b, norm),
            2 * z.n * z.k * z.r,
        ),
        "dora scale": Item(
            lambda: dora.scale(zs, magnitude, length, None, y),
            [y],
            [("y", lambda: y[rows], lambda: zs[rows].double() * ratio)],
            nbytes(zs, y),
        ),
        "dora scale_backward": Item(
            lambda: dora.scale_backward(dy, zs, magnitude, length, dz, sums, other, needs_bias=True),
            [dz, sums],
            [
                ("dZ", lambda: dz[rows], lambda: dy[rows].double() * ratio),
                ("dm", lambda: sums[0, outputs], summed),
            ],
            nbytes(dy, zs, dz),
        ),
    }


def experts(c: Case) -> dict[str, Item]:
    """The segment kernels, which mixed batches share, on rows sorted by expert."""
    z, (count, each, n, k) = c.sizes, c.sizes.experts
    positions = z.m * each
    owner = torch.randint(count, (positions,), device=c.device, generator=c.generator).sort().values
    plan = Routed(torch.bincount(owner, minlength=count).cumsum(0).int(), positions)
    a, b = c.normal(count, z.r, k, scale=k**-0.5, adapter=True), c.normal(count, n, z.r, scale=0.25, adapter=True)
    tokens = torch.randint(z.m, (positions,), device=c.device, generator=c.generator)
    gathering = plan.gathering(tokens.int())
    x, dy, s = c.normal(z.m, k), c.normal(positions, n), c.normal(positions, z.r, adapter=True)
    gathered = x[tokens]
    out_s, ds, y = c.out(*s.shape, adapter=True), c.out(*s.shape, adapter=True), c.out(positions, n)
    factors, rows = expert_factors(a, b, SCALING, c.p), c.some(positions)
    da, db = (c.out(factors.total_rank * width, dtype=s.dtype) for width in (k, n))
    spaces = [
        c.workspace(segments.segment_shrink_workspace(x, gathering, factors)),
        c.workspace(segment_grads.segment_ds_db_workspace(dy, plan, factors)),
        c.workspace(segment_grads.segment_weight_grad_workspace(x, gathering, factors)),
    ]
    one = int(owner[positions // 2])  # an expert's sums
    own = (owner == one).nonzero().flatten()
    per_row = lambda left, right: torch.einsum("mi,mji->mj", left[rows].double(), right.double())  # noqa: E731
    low_rank = lambda: c.dropped(gathered, rows).unsqueeze(1) @ a[owner[rows]].double().mT  # noqa: E731
    flops = 2 * positions * z.r
    found = {
        "segment_shrink": Item(
            lambda: segments.segment_shrink(x, gathering, factors, out_s, spaces[0], seed=c.seed),
            [out_s],
            [("S", lambda: out_s[rows], lambda: low_rank().squeeze(1))],
            nbytes(gathered, a, s),
            flops * k,
        ),
        "segment_weight_grad": Item(
            lambda: segment_grads.segment_weight_grad(x, gathering, factors, s, da, spaces[2], seed=c.seed),
            [da],
            [("dA", lambda: da.view(a.shape)[one], lambda: s[own].double().t() @ c.dropped(gathered, own))],
            nbytes(gathered, s, da),
            flops * k,
        ),
    }
    if not c.p:
        found |= {
            "segment_expand": Item(
                lambda: segments.segment_expand(s, plan, factors, y, accumulate=False),
                [y],
                [("y", lambda: y[rows], lambda: SCALING * per_row(s, b[owner[rows]]))],
                nbytes(s, b, y),
                flops * n,
            ),
            "segment_ds_db": Item(
                lambda: segment_grads.segment_ds_db(dy, plan, factors, s, ds, db, spaces[1]),
                [ds, db],
                [
                    ("dS", lambda: ds[rows], lambda: SCALING * per_row(dy, b[owner[rows]].mT)),
                    ("dB", lambda: db.view(b.shape)[one], lambda: SCALING * dy[own].double().t() @ s[own].double()),
                ],
                nbytes(dy, b, s, ds, db),
                2 * flops * n,
            ),
        }
    return found


def heads(c: Case) -> dict[str, Item]:
    z = c.sizes
    h, w = c.normal(z.tokens, z.k), c.normal(z.words, z.k, scale=z.k**-0.5)
    a, b = c.a(), c.normal(z.words, z.r, scale=0.25, adapter=True)
    labels = torch.randint(z.words, (z.tokens,), device=c.device, generator=c.generator)
    rows, out = c.some(z.tokens)[:8], c.out(z.tokens, dtype=FP32)

    def run() -> None:
        with torch.no_grad():
            out.copy_(lora_linear_log_probs(h, w, a, b, labels, SCALING))

    def exact() -> Tensor:
        logits = h[rows].double() @ w.double().t() + SCALING * h[rows].double() @ a.double().t() @ b.double().t()
        return logits.log_softmax(1).gather(1, labels[rows, None]).squeeze(1)

    flops = 2 * z.tokens * z.words * z.k
    return {"head log_probs": Item(run, [out], [("log p", lambda: out[rows], exact)], nbytes(h, w, b), flops)}


def four_bits(c: Case) -> dict[str, Item]:
    z, block = c.sizes, 64
    count = z.n * z.k
    packed = torch.randint(256, (count // 2,), device=c.device, generator=c.generator).to(torch.uint8)
    code = torch.linspace(-1, 1, 16, device=c.device)
    absmax, out, picked = c.normal(-(-count // block)).float().abs(), c.out(count), c.some(count)
    digit = lambda: torch.where(picked % 2 == 0, packed[picked // 2] >> 4, packed[picked // 2] & 15).long()  # noqa: E731
    wanted = lambda: code[digit()].double() * absmax[picked // block]  # noqa: E731
    run = lambda: dequantise_4bit(packed, code, absmax, out, block)  # noqa: E731
    return {"nf4": Item(run, [out], [("W", lambda: out[picked], wanted)], nbytes(packed, absmax, out))}


DROPPING = (shrinks, expands, gradients, gemms, groups, activations, experts)
FAMILIES = {family.__name__: family for family in (*DROPPING, doras, heads, four_bits)}


def kinds(gpu: bool) -> Iterable[tuple[str, torch.dtype, torch.dtype, float]]:
    for name, family in FAMILIES.items():
        for dtypes in ((BF16, BF16), (BF16, FP32)) if gpu else ((FP32, FP32),):
            for p in (0.0, DROPOUT) if family in DROPPING else (0.0,):
                yield name, *dtypes, p


def sizes_of(device: str) -> Sizes:
    return Sizes() if device == "cuda" else TINY


def items_of(device: str, name: str, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float) -> dict[str, Item]:
    return FAMILIES[name](Case(sizes_of(device), torch.device(device), dtype, adapter_dtype, p))


def compiled(device: str, kind: tuple[str, torch.dtype, torch.dtype, float]) -> None:
    """Leaves a kind's kernels in Triton's cache. What fails, fails again where it is seen."""
    try:
        for item in items_of(device, *kind).values():
            item.run()
    except Exception:
        pass


def allowed(out: Tensor, wide: bool) -> float:
    """Of a relative error in norm: a rounding of half precision, or that of split operands (kernels/tiling.py)."""
    return torch.finfo(out.dtype).eps if out.dtype.itemsize == 2 else 2e-5 if wide else 1e-2


def report(name: str, item: Item, wide: bool, gpu: bool) -> dict[str, Any]:
    """Runs one item: its error, bits and time."""
    item.run()
    first, error, failures = [out.clone() for out in item.outs], 0.0, []
    for what, got, wanted in item.checks:
        value, exact = got(), wanted()
        one = ((value.double() - exact).norm() / exact.norm()).item()
        error = max(error, one)
        if not one <= allowed(value, wide):
            failures.append(f"{what} is off by {one:.1e}, allowed {allowed(value, wide):.0e}")
    for out in item.outs:
        out.fill_(math.nan)
    begun = time.perf_counter()
    item.run()
    seconds = time.perf_counter() - begun
    if not all(map(torch.equal, first, item.outs)):
        failures.append("a second run gives other bits")
    if any(out.isnan().any() for out in first):
        failures.append("not all is written")
    if gpu:
        seconds = Summary.of(timer_for(torch.device("cuda")).interleaved({"": item.run}, 7)[""]).median
    predicted = max(item.bytes / H200.bandwidth, item.flops / H200.flops)
    compute = item.flops / H200.flops > item.bytes / H200.bandwidth
    rate = f"{item.flops / seconds / 1e12:6.0f} TFLOP/s" if compute else f"{item.bytes / seconds / 1e9:6.0f} GB/s"
    print(
        f"{name:<52}{error:9.1e} {1e6 * seconds:9.1f} µs {rate:>14}  predicted {1e6 * predicted:8.1f} µs "
        f"{seconds / predicted:6.2f} x  {'FAILED: ' + '; '.join(failures) if failures else 'passed'}",
        flush=True,
    )
    return {"error": error, "seconds": seconds, "predicted": predicted, "failures": failures}


def families(device: str, jobs: int, deadline: float, only: Sequence[str]) -> dict[str, Any]:
    gpu, found = device == "cuda", {}
    wanted = [kind for kind in kinds(gpu) if not only or kind[0] in only]
    if jobs > 1:
        begun, context = time.monotonic(), multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        with concurrent.futures.ProcessPoolExecutor(min(jobs, len(wanted)), context) as pool:
            list(pool.map(compiled, [device] * len(wanted), wanted))
        print(f"compiled by {jobs} processes in {time.monotonic() - begun:.0f} s", flush=True)
    for kind in wanted:
        name, dtype, adapter_dtype, p = kind
        label = f"{dtype}, {adapter_dtype}".replace("torch.", "") + (", dropout" if p else "")
        if time.monotonic() > deadline:
            print(f"{name}, {label}: left out, no time", flush=True)
            continue
        try:
            items = items_of(device, *kind)
        except Exception as error:  # the other families are still to be seen
            items = {}
            found[f"{name}, {label}"] = {"failures": [f"{type(error).__name__}: {error}"]}
            print(f"{name}, {label}: FAILED: {type(error).__name__}: {error}", flush=True)
        for one, item in items.items():
            try:
                found[f"{one}, {label}"] = report(f"{one}, {label}", item, adapter_dtype != dtype, gpu)
            except Exception as error:
                found[f"{one}, {label}"] = {"failures": [f"{type(error).__name__}: {error}"]}
                print(f"{one}, {label}: FAILED: {type(error).__name__}: {error}", flush=True)
        if gpu:
            torch.cuda.empty_cache()
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device does at most: a product, a copy, a fill, and `addmm_` at beta 0 and 1."""
    timer, gpu = timer_for(device), device.type == "cuda"
    roof = machine.measure_roof(device, "bfloat16" if gpu else "float32", timer)
    m, k = (8192, 4096) if gpu else (64, 48)
    x, w = (torch.randn(shape, device=device).to(BF16) for shape in ((m, k), (k, k)))
    y = torch.empty_like(x)
    functions: dict[str, Callable[[], object]] = {"fill": lambda: y.fill_(0.0)}
    functions |= {f"addmm beta {beta}": lambda beta=beta: y.addmm_(x, w, beta=beta) for beta in (0, 1)}
    found = {name: Summary.of(s).median for name, s in timer.interleaved(functions, 10).items()}
    print(f"ceilings: {roof.flops / 1e12:.0f} TFLOP/s, copy {roof.bandwidth / 1e9:.0f} GB/s", flush=True)
    print(", ".join(f"{name} {1e6 * value:.1f} µs" for name, value in found.items()), flush=True)
    return found | {"flops": roof.flops, "bandwidth": roof.bandwidth}


def self_checks(device: torch.device, deadline: float) -> dict[str, str | None]:
    """Every first-use check, by name: None where it passed."""
    gpu = device.type == "cuda"
    checks: dict[str, Callable[[], str | None]] = {}
    dtypes = [(BF16, BF16), (BF16, FP32), (torch.float16, torch.float16), (FP32, FP32)] if gpu else [(FP32, FP32)]
    modules: dict[str, Any] = {
        name: module_or_reason(f"fastlora.ops.{name}.triton") for name in ("group", "mlp", "mixed", "experts")
    }
    for pair in dtypes:
        for p in (False, True) if gpu else (False,):
            label = f"{pair[0]}, {pair[1]}{', dropout' * p}".replace("torch.", "")
            for name in ("cublas", "triton", "triton_s_inside") if gpu else ("cublas",):  # a minute each, interpreted
                if name != "triton_s_inside" or (not p and pair[0] == pair[1] != FP32):
                    checks[f"{name} {label}"] = lambda name=name, d=pair, p=p: choice.self_check(
                        choice.load(name), device, *d, p
                    )
            several: dict[str, Any] = {"group": group_op, "mixed": mixed_op, "experts": experts_op}
            for name, op in several.items():
                checks[f"{name} {label}"] = lambda op=op, m=modules[name], d=pair, p=p: op.self_check(m, device, *d, p)
            checks[f"mlp {label}"] = lambda d=pair, p=p: mlp_op.self_check(modules["mlp"], device, *d, p, "silu")
        label = f"{pair[0]}, {pair[1]}".replace("torch.", "")
        module = module_or_reason("fastlora.ops.dora.triton")
        checks[f"dora {label}"] = lambda d=pair, m=module: dora_op.self_check(m, device, *d)
    checks["head"] = lambda: head_op.self_check(module_or_reason("fastlora.ops.head.triton"), device)  # type: ignore[arg-type]
    found: dict[str, str | None] = {}
    for name, check in checks.items():
        if time.monotonic() > deadline:
            break
        begun = time.monotonic()
        try:
            found[name] = check()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        verdict = "passed" if found[name] is None else f"FAILED: {found[name]}"
        print(f"self-check {name:<44}{verdict} ({time.monotonic() - begun:.1f} s)", flush=True)
    return found


def eager_loop(device: torch.device, sizes: Sizes, calls: int) -> dict[str, dict[str, float]]:
    """Seconds of a layer's forward and backward pass in an eager loop of `calls`: until all is queued (host), and until
    all is done (wall)."""
    found: dict[str, dict[str, float]] = {}
    dtype, names = ("bfloat16", ("frozen", "eager", "peft", "torch", "cublas", "triton"))
    for m in sizes.loop:
        for name in names if device.type == "cuda" else names[:4]:
            tensors = contenders.Tensors.random(Problem(m, sizes.n, sizes.k, sizes.r, dtype, "float32"), device)
            ((x, dy),) = tensors.inputs(1, device)
            try:
                built = contenders.build(name, tensors)
            except contenders.Unavailable as error:
                print(f"eager loop M={m} {name}: left out: {error}", flush=True)
                continue
            wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
            for _ in range(3):
                built.backward(built.forward(x), x, dy)
            wait()
            begun = time.perf_counter()
            for _ in range(calls):
                built.backward(built.forward(x), x, dy)
            queued = time.perf_counter() - begun
            wait()
            whole = time.perf_counter() - begun
            found[f"M={m} {name}"] = {"host": queued / calls, "wall": whole / calls}
            print(
                f"eager loop M={m:<6}{name:<10}host {1e6 * queued / calls:8.1f} µs   "
                f"wall {1e6 * whole / calls:9.1f} µs",
                flush=True,
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = command("smoke", __doc__, None, "device")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile first (default: 1, this one)")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds")
    parser.add_argument("--only", help="comma-separated, of: " + ", ".join(FAMILIES))
    options = parser.parse_args(arguments)
    only = options.only.split(",") if options.only else []
    if unknown := sorted(set(only) - set(FAMILIES)):
        parser.error(f"--only: got {', '.join(unknown)}, want some of {', '.join(FAMILIES)}")
    device, limit = torch.device(options.device), options.time_limit
    print(", ".join(f"{key} {value}" for key, value in machine.describe(device).items()), flush=True)
    torch.zeros(1, device=device)
    print(f"context after {time.monotonic() - begun:.1f} s of this command", flush=True)
    record: dict[str, Any] = {"machine": machine.describe(device)}
    record["families"] = families(options.device, options.jobs, begun + 0.7 * limit, only)
    failed = [name for name, one in record["families"].items() if one["failures"]]
    if not only:
        record["ceilings"] = ceilings(device)
        record["eager loop"] = eager_loop(device, sizes_of(options.device), 50 if device.type == "cuda" else 2)
        record["self_checks"] = self_checks(device, begun + limit)
        failed += [name for name, why in record["self_checks"].items() if why is not None]
    if options.out:
        write_json(options.out, record)
    total = len(record["families"])
    none = all(one["failures"] for one in record["families"].values())
    print(f"{total} items, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}", flush=True)
    return 3 if none else 1 if failed else 0
