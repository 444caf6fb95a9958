"""A mixture's expert layer with LoRA on both of its weights, as a case to measure: the router's choice is given.

`python -m bench.layers.experts` prints what docs/kernels/experts.md counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.functional import Routing, lora_grouped_linear

from ..harness.contenders import Contender, Unavailable
from ..harness.counting import H200, Problem, Step, total_time
from ..harness.turns import Case, Work, rotation

SCALING = 2.0
Linear = Callable[[int, Tensor, Routing], Tensor]  # 0: gate and up, from x; 1: down, to each token's weighted sum


@dataclass(frozen=True)
class Mixture:
    """`experts` of hidden -> 2·inner -> hidden, of which each of `tokens` takes `top_k`."""

    tokens: int
    experts: int
    hidden: int
    inner: int
    top_k: int


MIXTURES = {  # Qwen3-30B-A3B's layer, and a quarter of its weights
    "cuda": [Mixture(tokens, 128, 2048, 768, 8) for tokens in (8192, 2048, 32768)],
    "cpu": [Mixture(tokens, 128, 1024, 384, 8) for tokens in (512, 128)],
    "tiny": [Mixture(12, 4, 16, 8, 2)],
}


class Experts(nn.Module):
    """What transformers' `grouped_mm_experts_forward` computes, in its order."""

    def __init__(self, mixture: Mixture, like: Problem, device: torch.device) -> None:
        super().__init__()
        self.mixture = m = mixture
        dtype, adapter_dtype = getattr(torch, like.dtype), getattr(torch, like.adapter_dtype)
        shapes = ((m.experts, 2 * m.inner, m.hidden), (m.experts, m.hidden, m.inner))
        self.gate_up_proj, self.down_proj = (
            nn.Parameter((torch.randn(shape, device=device) * shape[2] ** -0.5).to(dtype), requires_grad=False)
            for shape in shapes
        )
        # In PEFT's layouts: lora_A (E·r, in) and lora_B (out, r·E), the expert slowest and fastest.
        self.factors = [
            (torch.randn(shape, device=device) * 0.02).to(adapter_dtype).requires_grad_()
            for _, n, k in shapes
            for shape in ((m.experts * like.r, k), (n, like.r * m.experts))
        ]
        scores = torch.randn(m.tokens, m.experts, device=device).topk(m.top_k)
        self.index, self.top = scores.indices, scores.values.softmax(-1).to(dtype)

    def adapter(self, i: int) -> tuple[Tensor, Tensor]:
        """(E, r, K) and (E, N, r), views."""
        experts, (a, b) = self.mixture.experts, self.factors[2 * i : 2 * i + 2]
        return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)

    def weights(self, i: int) -> Tensor:
        return self.down_proj if i else self.gate_up_proj

    def frozen(self, i: int, x: Tensor, routing: Routing) -> Tensor:
        return self.product(self.weights(i), i, x, routing)

    def product(self, weight: Tensor, i: int, x: Tensor, routing: Routing) -> Tensor:
        y = F.grouped_mm(x if i else x[routing.rows], weight.transpose(1, 2), offs=routing.offsets)
        if i == 0:
            return y
        y = y * self.top.reshape(-1, 1)[routing.order]
        back = torch.empty_like(routing.order).scatter_(0, routing.order, torch.arange(len(y), device=y.device))
        return y[back].view(*self.index.shape, -1).sum(1)

    def forward(self, x: Tensor, linear: Linear | None = None) -> Tensor:
        linear, routing = linear or self.frozen, Routing(self.index, self.mixture.experts)
        gate, up = linear(0, x, routing).chunk(2, dim=-1)
        return linear(1, F.silu(gate) * up, routing)


def experts_case(mixture: Mixture, like: Problem, device: torch.device) -> Case:
    """Rank and dtypes are those of `like`."""
    torch.manual_seed(0)
    experts = Experts(mixture, like, device)
    dtype = experts.top.dtype
    size = mixture.tokens * mixture.hidden * dtype.itemsize
    pairs: list[Any] = [
        tuple(torch.randn(mixture.tokens, mixture.hidden, device=device).to(dtype) for _ in range(2))
        for _ in range(rotation(2 * size, device))
    ]
    parameters = (experts.gate_up_proj, experts.down_proj)

    def eager(i: int, x: Tensor, routing: Routing) -> Tensor:
        a, b = experts.adapter(i)
        return experts.product((experts.weights(i) + SCALING * (b @ a)).to(x.dtype), i, x, routing)

    def fused(i: int, x: Tensor, routing: Routing) -> Tensor:
        a, b = experts.adapter(i)
        combine = experts.top if i else None
        return lora_grouped_linear(
            x, experts.weights(i), routing, [a], [b], [SCALING], gathered=i == 0, combine=combine
        )

    def contender(name: str, linear: Linear | None) -> Contender:
        leaves = () if linear is None else tuple(experts.factors)
        return Contender(name, lambda x: experts(x, linear), leaves, parameters)

    m = mixture
    return Case(
        f"experts: {m.tokens} tokens to {m.top_k} of {m.experts}, {m.hidden} -> 2 x {m.inner} -> {m.hidden} "
        f"r={like.r} {like.dtype}, {like.adapter_dtype} adapters",
        {"form": "experts", **like.__dict__, **m.__dict__},
        work(m, like),
        [(x.requires_grad_(), dy) for x, dy in pairs],
        {
            "frozen": lambda: contender("frozen", None),
            "eager": lambda: contender("eager", eager),
            "peft": lambda: peft(experts, like),
            "experts": lambda: contender("experts", fused),
        },
    )


def work(m: Mixture, like: Problem) -> dict[str, Work]:
    """The frozen products of routed rows, forward and dX, and the adapters', thrice those of the forward pass; each
    weight, factor and long operand moved once."""
    rows, frozen = m.tokens * m.top_k, 3 * m.hidden * m.inner
    low_rank = like.r * (2 * m.hidden + 3 * m.inner)
    tensors = 2 * m.tokens * m.hidden + rows * 3 * m.inner
    nbytes = getattr(torch, like.dtype).itemsize * (tensors + m.experts * frozen)
    nbytes += getattr(torch, like.adapter_dtype).itemsize * m.experts * low_rank
    forward = Work(2 * rows * (frozen + low_rank), nbytes)
    return {"forward": forward, "both": Work(2 * rows * (2 * frozen + 3 * low_rank), 3 * nbytes)}


def peft(experts: Experts, like: Problem) -> Contender:
    """PEFT's `target_parameters`: W + ΔW of all experts, kept for the backward pass, and dense gradients."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Unavailable(f"peft is not installed: {error}") from None
    names = ["gate_up_proj", "down_proj"]
    targets = [f"experts.{name}" for name in names]
    config = LoraConfig(r=like.r, lora_alpha=int(SCALING * like.r), target_modules=[], target_parameters=targets)
    root: Any = nn.Module()
    root.experts = experts
    model: Any = get_peft_model(root, config)
    outer = model.base_model.model.experts
    wrappers = {one.parameter_name: one for one in (outer, outer.base_layer)}
    leaves = []
    for name, holder, value in zip(
        (n for n in names for _ in "AB"), ("lora_A", "lora_B") * 2, experts.factors, strict=True
    ):
        linear = getattr(wrappers[name], holder)["default"]
        linear.weight = nn.Parameter(value.detach())
        leaves.append(linear.weight)
    return Contender("peft", outer, tuple(leaves), (experts.gate_up_proj, experts.down_proj))


def counted(m: Mixture, r: int = 16) -> tuple[list[Step], list[Step], list[Step]]:
    """(the frozen products, what transformers does between them, what takes its place here and the adapters' passes)
    of a training step in bf16: each operand moved once, partial sums written and read, a multiprocessor a program."""
    rows, inner, sms = m.tokens * m.top_k, m.inner, 132
    wide, narrow, tokens, thin = (2 * size for size in (rows * m.hidden, rows * inner, m.tokens * m.hidden, rows * r))

    def moved(name: str, *sizes: int) -> Step:
        return Step(name, 0, sum(sizes))

    def product(columns: int) -> Step:
        nbytes = wide + 2 * (rows + m.experts * m.hidden) * columns
        return Step("product", 2 * rows * m.hidden * columns, nbytes)

    def passes(name: str, k: int, n: int, x: int, y: int, dy: int, dx: int, dots: int) -> list[Step]:
        a, b, strips, blocks = 2 * m.experts * r * k, 2 * m.experts * r * n, -(-n // 256), -(-k // 128)
        return [
            moved(f"{name}: S", x, a, thin),
            moved(f"{name}: y", 2 * y, b, thin),
            moved(f"{name}: dS, dB", dy, 2 * thin, 2 * b, 8 * r * (rows * strips + n * (m.experts + sms // strips))),
            moved(f"{name}: dX", 2 * dx, dots, a, thin),
            moved(f"{name}: dA", x, thin, a, 8 * r * k * (m.experts + 2 * sms // blocks)),
            moved(f"{name}: lora_B copied", 4 * b),
        ]

    gating = [moved("gating", 3 * narrow), moved("gating, backward", 5 * narrow)]
    between = [moved("gather", wide), moved("weights", 2 * wide), moved("order", 2 * wide), moved("sum", wide + tokens)]
    between += [moved("dY", wide + tokens), moved("dY, weighted", 2 * wide), moved("dweights", 2 * wide)]
    between += [moved("dx of the gather", wide + tokens), *gating]
    ours = [moved("gather", wide), moved("sum", wide + tokens), moved("gather of dY", wide), *gating]
    ours += [moved("sum of dx", wide + tokens), moved("S and dS, weighted", 4 * thin)]
    ours += passes("gate, up", m.hidden, 2 * inner, tokens, 2 * narrow, 2 * narrow, wide, 0)
    ours += passes("down", inner, m.hidden, narrow, wide, tokens, narrow, narrow)
    return [product(2 * inner), product(inner)] * 2, between, ours


def main() -> None:
    for mixture in MIXTURES["cuda"]:
        products, between, ours = counted(mixture)
        frozen, own = (total_time([*products, *rest], H200) for rest in (between, ours))
        print(f"{mixture.tokens} tokens: frozen {1e3 * frozen:.2f} ms, fastlora {own / frozen - 1:+.1%}")
        for step in [*products[:2], *ours] if mixture.tokens == 8192 else ():
            print(f"  {step.name:22} {step.bytes / 1e6:6.0f} MB {1e6 * step.time(H200):6.0f} us")


if __name__ == "__main__":
    main()
