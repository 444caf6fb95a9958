"""The kernels of DoRA, experts, groups, the head's loss, importance, MLPs, NF4 and mixed batches, launched as training
steps launch them, at the problems that hold most in registers for each configuration that the rules have; the headline
is first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from aot import sweep
from aot.pretend import Launch, pretend
from aot.sweep import BF16, FP32

from fastlora.kernels import dora, group, head, importance, mlp, segment_grads, segments
from fastlora.kernels.importance_plan import Layout
from fastlora.kernels.nf4 import dequantise_4bit
from fastlora.kernels.segment_factors import expert_factors, factors_of
from fastlora.kernels.segment_plan import Routed, Segments

M = 8192


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=sweep.META)


def seed() -> torch.Tensor:
    return empty(1, dtype=torch.int64)


# Every kernel of a family as a training step of a problem launches it.
def launch_dora(r, dtype, adapter_dtype, m=M, n=4096, k=4096):
    weight, z = empty(n, k, dtype=dtype), empty(m, n, dtype=dtype)
    a, b = empty(r, k, dtype=adapter_dtype), empty(n, r, dtype=adapter_dtype)
    dora.dora_norm(weight, a, b, 2.0, empty(n), empty(dora.norm_workspace(weight, a)))
    magnitude, norm, bias = empty(n), empty(n), empty(n, dtype=dtype)
    dora.scale(z, magnitude, norm, bias, torch.empty_like(z))
    workspace = empty(dora.scale_backward_workspace(z))
    dora.scale_backward(z, z, magnitude, norm, torch.empty_like(z), empty(2, n), workspace, needs_bias=True)


def launch_group(k, ranks, dtype, adapter_dtype, p):
    x, lora_As = empty(M, k, dtype=dtype), [empty(r, k, dtype=adapter_dtype) for r in ranks]
    s = [empty(M, r, dtype=adapter_dtype) for r in ranks]
    dropout = {"seeds": [seed() if p else None for _ in ranks], "dropout_ps": [p for _ in ranks]}

    def workspace(size):
        return empty(size) if size else None

    group.group_shrink(x, lora_As, s, workspace(group.shrink_workspace(x, lora_As)), **dropout)
    outs = [empty(*a.shape, dtype=adapter_dtype).t() for a in lora_As]
    group.group_weight_grad(x, s, outs, workspace(group.weight_grad_workspace(x, ranks)), **dropout)
    group.group_expand(s, [a.t() for a in lora_As], empty(M, k, dtype=dtype), accumulate=True, **dropout)


def launch_head(words, dtype, softcap=0.0):
    """A sum's loss with its gradient; every statistic; the gradient of both, each as the ops launch it."""
    z, labels, (g, h, loss) = (
        empty(840, words, dtype=dtype),
        empty(840, dtype=torch.int64),
        (empty(840) for _ in range(3)),
    )
    steps = {"softcap": softcap, "scale": 0.5, "temperature": 0.7, "lse": empty(840, 2)}
    head.head(z, labels, **steps, loss=loss, gradient=True)
    scores = {"entropy": h, "top1": empty(840, dtype=torch.bool), "mean_logits": empty(840), "log_sum_sq": empty(840)}
    head.head(z, labels, **steps, loss=loss, **scores)
    head.head(z, labels, **steps, gradient=True, grad=g, grad_entropy=g, entropy=h)


def launch_importance(r, k, n, dtype, aligned):
    layout = Layout([(r, k, n)] * 3)
    sizes = importance.partials_size(layout, sweep.META)
    flat = [empty(layout.numel), empty(layout.numel), empty(layout.total_rank), *(empty(size) for size in sizes)]
    like, addresses = empty(r, 1, dtype=dtype), empty(3, 6, dtype=torch.int64)
    importance.update(layout, addresses, like, *flat, empty(1), 0.85, 0.85, aligned)


def launch_mlp(r, dtype, adapter_dtype, activation, m=M, k=14336):
    gate, dh, up = (empty(m, k, dtype=dtype) for _ in range(3))
    a, s = empty(r, k, dtype=adapter_dtype), empty(m, r, dtype=adapter_dtype)
    dropout = {"seed": seed(), "dropout_p": 0.1}
    workspace = empty(mlp.activate_workspace(gate, a))
    mlp.activate(gate, up, activation, torch.empty_like(gate), a, s, workspace, **dropout)
    workspace = empty(mlp.activate_backward_workspace(gate, r))
    outs = dh, torch.empty_like(gate), torch.empty_like(a)
    mlp.activate_backward(dh, s, gate, up, activation, a, *outs, workspace, **dropout)


def launch_nf4(dtype, block, nested, n):
    blocks, inner = -(-n // block), {}
    if nested:
        inner = {"code2": empty(256), "absmax2": empty(-(-blocks // 256)), "offset": empty(1)}
    absmax = empty(blocks, dtype=torch.uint8 if nested else FP32)
    packed = empty(-(-n // 2), dtype=torch.uint8)
    dequantise_4bit(packed, empty(16), absmax, empty(n, dtype=dtype), block, **inner)


def launch_segments(tokens, ranks, dtype=BF16, adapter_dtype=BF16, n=4096, k=4096):
    plan = Segments([0, 1] * 4, tokens)
    lora_As = [empty(r, k, dtype=adapter_dtype) for r in ranks]
    lora_Bs = [empty(n, r, dtype=adapter_dtype) for r in ranks]
    factors = factors_of(lora_As, lora_Bs, [2.0, 1.0], [0.1, 0.0])
    x, dy = empty(8 * tokens, k, dtype=dtype), empty(8 * tokens, n, dtype=dtype)
    segments.segment_expand(s_of(plan, factors), plan, factors, dy, bias=empty(n, dtype=dtype), accumulate=False)
    launch_passes(x, dy, plan, plan, factors)


def launch_experts(r, dtype=BF16, adapter_dtype=BF16, n=1536, k=2048, tokens=M, top_k=8, experts=128):
    """Of Qwen3-30B-A3B: the gate and up projections, and what differs for `down`, which weights its rows."""
    plan = Routed(empty(experts, dtype=torch.int32), tokens * top_k)
    gathering = plan.gathering(empty(plan.num_positions, dtype=torch.int32))
    a, b = empty(experts, r, k, dtype=adapter_dtype), empty(experts, n, r, dtype=adapter_dtype)
    factors = expert_factors(a, b, 2.0, 0.1)
    x, dy = empty(tokens, k, dtype=dtype), empty(plan.num_positions, n, dtype=dtype)
    s, weights, wide = s_of(plan, factors), empty(plan.num_positions, dtype=dtype), empty(len(dy), k, dtype=dtype)
    of = {"bias": empty(experts, n, dtype=dtype), "base": torch.empty_like(dy), "weights": weights}
    segments.segment_expand(s, gathering, factors, dy, **of)
    segments.segment_expand(s, plan, factors, wide, by_a=True, seed=seed(), weights=weights, x=torch.empty_like(wide))
    launch_passes(x, dy, gathering, plan, factors, torch.empty_like(wide))


def s_of(plan, factors):
    return empty(plan.num_positions, factors.max_rank, dtype=factors.like.dtype)


def launch_passes(x, dy, plan_of_x, plan, factors, base=None):
    s, ds, dx = s_of(plan, factors), s_of(plan, factors), empty(plan.num_positions, x.shape[1], dtype=x.dtype)
    db, da = (empty(factors.total_rank * t.shape[1], dtype=s.dtype) for t in (dy, x))
    size = segments.segment_shrink_workspace(x, plan_of_x, factors)
    segments.segment_shrink(x, plan_of_x, factors, s, empty(size), seed=seed())
    segments.segment_expand(ds, plan, factors, dx, by_a=True, seed=seed(), base=base)
    size = segment_grads.segment_ds_db_workspace(dy, plan, factors)
    segment_grads.segment_ds_db(dy, plan, factors, s, ds, db, empty(size))
    size = segment_grads.segment_weight_grad_workspace(x, plan_of_x, factors)
    segment_grads.segment_weight_grad(x, plan_of_x, factors, ds, da, empty(size), seed=seed())


@dataclass(frozen=True)
class Family:
    launch: Callable[..., None]
    kernels: str  # what their names begin with
    problems: Sequence[tuple]
    usual: int = 1  # so many of the problems are not slow


FAMILIES = {
    "experts": Family(  # the kernels of "segments"; other ranks and dtypes are there
        launch_experts,
        "_segment",
        [
            (16,),
            (16, BF16, FP32),
            (8, BF16, BF16, 2880, 2880, 64, 4, 32),  # gpt-oss: few rows an expert
            (16, FP32, FP32),
            (16, BF16, BF16, 1001, 1003),
        ],
    ),
    "dora": Family(
        launch_dora,
        "_dora _root _scale",
        [
            (16, BF16, FP32),
            (64, BF16, FP32, 1000, 1001, 1003),  # narrow, so that its columns are split
            (16, BF16, BF16),
            (128, BF16, FP32),
            (256, BF16, BF16),
            (16, FP32, FP32, M, 1024),
        ],
        usual=2,
    ),
    "group": Family(
        launch_group,
        "_group",
        [
            (4096, (16, 16, 16), BF16, BF16, 0.0),
            (4096, (16, 16, 16), BF16, FP32, 0.1),
            (4096, (64, 64), BF16, FP32, 0.1),
            (4096, (64, 64, 64), BF16, FP32, 0.1),
            (4096, (64, 64, 64), FP32, FP32, 0.1),
            (1003, (64, 64, 64), BF16, FP32, 0.1),
        ],
    ),
    "head": Family(
        launch_head,
        "_head",
        [(151_936, FP32), (151_936, FP32, 30.0), (151_936, BF16, 30.0), (50_257, FP32, 30.0), (50_257, FP32)],
        usual=2,
    ),
    "importance": Family(
        launch_importance,
        "_",
        [
            (12, 4096, 11008, FP32, True),
            (12, 4096, 11008, BF16, True),
            (128, 4096, 4096, FP32, True),
            (13, 1003, 777, FP32, False),
        ],
        usual=4,
    ),
    "mlp": Family(  # no other activation, flag or rank that was tried takes more registers
        launch_mlp,
        "_activate",
        [
            (16, BF16, BF16, "silu"),
            (64, BF16, FP32, "gelu"),
            (64, BF16, FP32, "gelu", 1000, 1003),
            (16, FP32, FP32, "gelu"),
        ],
        usual=4,
    ),
    "nf4": Family(
        launch_nf4,
        "_",
        [(BF16, 64, True, 4096 * 4096), (FP32, 4096, False, 4096 * 4096), (BF16, 64, True, 4097 * 1001)],
        usual=3,
    ),
    "segments": Family(
        launch_segments,
        "_segment",
        [
            (1024, (16, 8)),
            (1024, (16, 8), BF16, FP32),
            (1024, (32, 16), BF16, FP32),
            (1024, (48, 16), BF16, FP32),
            (1024, (64, 16), BF16, FP32),
            (1024, (256, 16), BF16, FP32),
            (1, (16, 8)),
            (1, (64, 8), BF16, FP32),
            (1000, (15, 7), BF16, BF16, 1001, 1003),
            (1000, (64, 7), BF16, BF16, 1001, 1003),
            (1024, (16, 8), FP32, FP32),
            (1024, (64, 8), FP32, FP32),
        ],
    ),
}


def launches_of(family: Family, arch: int, problems: Sequence[tuple]) -> list[Launch]:
    """A kind once."""
    with pretend(arch) as recorded:
        for problem in problems:
            family.launch(*problem)
    own = [one for one in recorded if one.name.startswith(tuple(family.kernels.split())) and "reduce" not in one.name]
    return list({one.key: one for one in own}.values())
