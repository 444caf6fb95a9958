"""Factors for Adam's first step, which is sign(G) rather than G: `sign_factors` finds them, `SignFactors` holds them.

The first step of Adam on W moves it by −η sign(G); on A and B it moves the effective weight by −η s (B P + R A), where
P = sign(BᵀG) (r, m) and R = sign(GAᵀ) (n, r). Wanted are A and B with the least

    f(A, B) = min_c ‖c (B P + R A) − S‖² / ‖S‖²        S = sign(G)

(c is the learning rate's business, so that f does not change where A and B are scaled together). There is no closed
form: P and R jump. While they stay what they are, though, f is a least-squares problem, so `minimise` solves for B with
P and R fixed, then for A, goes as far in that direction as lowers f itself, takes the new P and R, and so on. f never
rises, and some ten rounds are enough.

A gradient sketch will not do: sign(G) needs every entry of G. So G is summed, in float32, for one layer (or a few) at a
time, which costs the backward passes once for each; or for all layers in one backward pass, each G used in the middle
of it. G is freed before the next one is formed, and nothing else of size n×m exists.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import linalg
from ..introspect import taps
from ..layers import experts
from ..runtime import messages, processes, progress
from ..runtime.checks import check_choice, check_integer
from .factors import SPLITS, split_factors
from .sketch import WEIGHTINGS, GradientSketch

ROUNDS = 30
LEAST_STEP = 1.0 / 64
LEAST_GAIN = 1e-5
BLOCK = 1024  # rows of sign(G) that exist at a time


class Matrix:
    """G as an operator, without the copy that `truncated_svd` makes of a tensor."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.shape, self.dtype, self.device = tuple(gradient.shape), gradient.dtype, gradient.device

    def matmul(self, v: Tensor) -> Tensor:
        """G v for v (m, k)."""
        return self.gradient @ v

    def rmatmul(self, u: Tensor) -> Tensor:
        """Gᵀ u for u (n, k)."""
        return self.gradient.t() @ u


class Signs(Matrix):
    """sign(G), an operator that multiplies from both sides: a block of rows at a time, so that no second (n, m) matrix
    exists."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__(gradient)
        self.squared_norm = float(sum(int(torch.count_nonzero(rows)) for _, rows in self._blocks()))

    def matmul(self, v: Tensor) -> Tensor:
        """sign(G) v for v (m, k)."""
        return torch.cat([rows @ v for _, rows in self._blocks()])

    def rmatmul(self, u: Tensor) -> Tensor:
        """sign(G)ᵀ u for u (n, k)."""
        out = u.new_zeros(self.shape[1], u.shape[1])
        for place, rows in self._blocks():
            out.addmm_(rows.t(), u[place])
        return out

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.shape[0], BLOCK):
            place = slice(start, start + BLOCK)
            yield place, torch.sign(self.gradient[place])


class Found(NamedTuple):
    """A (r, m) and B (n, r), with ‖A‖² + ‖B‖² = 2r as of orthonormal factors, f of them, and the rounds it took."""

    a: Tensor
    b: Tensor
    objective: float
    rounds: int


def objective(gradient: Tensor, signs: Signs, a: Tensor, b: Tensor) -> float:
    """f(A, B), in [0, 1]."""
    return _State(gradient, signs, a, b).objective


def minimise(gradient: Tensor, signs: Signs, a: Tensor, b: Tensor, rounds: int = ROUNDS) -> Found:
    """Lowers f from a start (A, B)."""
    state = _State(gradient, signs, a, b)
    state = _State(gradient, signs, a * state.best_scale, b * state.best_scale)
    done = 0
    for _ in range(rounds):
        better = _search(gradient, signs, state)
        if better is None:
            break
        done += 1
        gain, state = state.objective - better.objective, better
        if gain < LEAST_GAIN:
            break
    size = (2 * len(a) / (state.a.square().sum() + state.b.square().sum()).clamp_min(1e-30)).sqrt()
    return Found(state.a * size, state.b * size, state.objective, done)


def leading_factors(matrix: Matrix, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """A = Vᵀ[:r] and B = U[:, :r]: the same triplets on both sides. For signs that is a better start than LoRA-GA's
    disjoint halves: tests/init/test_sign.py compares them."""
    u, _, vh, _ = linalg.truncated_svd(matrix, r, seed=seed)
    return vh, u


class _State:
    """A point of the search and what belongs to it."""

    def __init__(self, gradient: Tensor, signs: Signs, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.p, self.r = torch.sign(b.t() @ gradient), torch.sign(gradient @ a.t())
        self.p_s = signs.matmul(self.p.t()).t()  # P Sᵀ (r, n)
        self.s_r = signs.rmatmul(self.r).t()  # RᵀS (r, m)
        inner = _dot(b.t(), self.p_s) + _dot(self.s_r, a)
        squared = (
            _dot(b.t() @ b, self.p @ self.p.t())
            + _dot(self.r.t() @ self.r, a @ a.t())
            + 2 * _dot(b.t() @ self.r, self.p @ a.t())
        )
        whole = signs.squared_norm
        self.best_scale = inner / squared if squared > 0 else 1.0
        self.objective = max(0.0, 1.0 - inner * inner / (squared * whole)) if squared > 0 and whole > 0 else 1.0


def _search(gradient: Tensor, signs: Signs, state: _State) -> _State | None:
    """The next point, or None where there is no better one in this direction."""
    cross = state.p @ state.a.t()  # P Aᵀ
    b = _solve(state.p @ state.p.t(), state.p_s - cross @ state.r.t()).t()
    a = _solve(state.r.t() @ state.r, state.s_r - (state.r.t() @ b) @ state.p)
    step = 1.0
    while step >= LEAST_STEP:
        candidate = _State(gradient, signs, torch.lerp(state.a, a, step), torch.lerp(state.b, b, step))
        if candidate.objective < state.objective:
            return candidate
        step /= 2
    return None


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares from the normal equations, in float64; columns of signs may coincide, hence the pseudo-inverse."""
    inverse = torch.linalg.pinv(gram.double(), rtol=1e-10, hermitian=True)
    return (inverse @ right.double()).to(right.dtype)


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum())


@dataclass(frozen=True)
class SignLayer:
    """One layer: A (r, m) and B (n, r) on the host.

    f(A, B), the share of ‖sign(G)‖² that Adam's first step on them misses at the best learning rate, is `objective`;
    `lora_ga` is that of LoRA-GA's own factors of G (ArB2r), `start` of those that the search began with. `rounds` it
    took; `tokens` that G is the sum of; `skipped` micro-batches that were not finite.
    """

    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    objective: float
    lora_ga: float
    start: float
    rounds: int
    tokens: int
    skipped: int


@dataclass
class SignFactors:
    """The layers' factors in the model's order; `str` of it is a table. `init_lora_ga(model, factors)` sets them.

    `sizes`: (n, m) of every layer looked at, those without a gradient too, which are not in `layers`. `experts`: the
    weights whose experts are among them.
    """

    r: int
    method: str
    sizes: dict[str, tuple[int, int]]
    layers: dict[str, SignLayer] = field(default_factory=dict)
    experts: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """The layers looked at."""
        return list(self.sizes)

    def has_gradient(self, name: str) -> bool:
        """Whether a layer has factors."""
        return name in self.layers

    def check_complete(self) -> None:
        """Raises ValueError, naming them, where layers had no gradient that was finite and not zero."""
        missing = [name for name in self.names if name not in self.layers]
        if missing:
            raise ValueError(
                f"sign_factors: {len(missing)} of {len(self.sizes)} layers had no finite gradient: "
                f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. Reach them in the backward passes, "
                'leave them out with exclude_modules, or pass missing="kaiming" to init_lora_ga'
            )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "n×m", "tokens", "LoRA-GA", "start", "reached", "rounds")]
        for name, (n, m) in self.sizes.items():
            line = self.layers.get(name)
            if line is None:
                rows.append((name, f"{n}×{m}", "no gradient", "", "", "", ""))
                continue
            values = (f"{value:.4f}" for value in (line.lora_ga, line.start, line.objective))
            rows.append((name, f"{n}×{m}", str(line.tokens), *values, str(line.rounds)))
        return messages.table(rows)


METHODS = ("direct", "svd")
CHUNK = 1024  # tokens cast to float32 at a time


def sign_factors(
    model: nn.Module,
    passes: Callable[[], Any],
    r: int = 8,
    target_modules: str | list[str] = "all-linear",
    *,
    exclude_modules: str | list[str] | None = None,
    method: str = "direct",
    split: str = "ArB2r",
    layers_at_once: int = 1,
    single_pass: bool = False,
    rounds: int = ROUNDS,
    dropout: bool = False,
    weighting: str = "equal",
    seed: int = 0,
    target_parameters: Sequence[str] | None = None,
) -> SignFactors:
    """Adapters' factors for Adam, whose first step is sign(G): A and B such that its first step on them is nearest.

    Runs `passes` once for every `layers_at_once` layers, each time with G of those layers alone. As in a
    `GradientSketch`, parameters are frozen and dropout is off while it runs, and the model is then as it was. Under
    torch.distributed the ranks' gradients are summed: n·m numbers a layer travel, unlike a sketch's.

    Args:
        model, target_modules, exclude_modules, target_parameters, r, dropout, weighting: as in `GradientSketch`. Each
            expert is a layer: take `single_pass`, or many layers at once.
        passes: runs the forward and backward passes, the same ones at each call.
        method: "direct" minimises the objective; "svd" takes LoRA-GA's answer for sign(G) in place of G.
        split: of "svd": see `init_lora_ga`.
        layers_at_once: layers whose G exist at a time: memory against calls of `passes`.
        single_pass: one call of `passes`, which may call each layer once: each G is formed, used and freed as soon as
            backward reaches its layer. For one micro-batch that holds enough tokens.
        rounds: of the search, at most.
        seed: of the randomised SVDs.

    Returns:
        `SignFactors`, whose `str` has the objective per layer; hand it to `init_lora_ga` in the sketch's place.

    Raises:
        ValueError: as `GradientSketch`; an unknown method or split; numbers out of range; single_pass with a layer that
            is called twice, or in several processes; a layer with fewer than 2r singular triplets.

    Examples:
        >>> def passes():
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        >>> factors = fastlora.sign_factors(model, passes, r=8)
        >>> fastlora.init_lora_ga(model, factors)

    Source: the objective is Su's (2024, https://spaces.ac.cn/archives/10226) at the best c; the search is our own.
    """
    for argument, value, choices in (
        ("method", method, METHODS),
        ("split", split, SPLITS),
        ("weighting", weighting, WEIGHTINGS),
    ):
        check_choice("sign_factors", argument, value, choices)
    check_integer("sign_factors", "layers_at_once", layers_at_once)
    check_integer("sign_factors", "rounds", rounds)
    chosen = GradientSketch(
        model, target_modules, r, exclude_modules=exclude_modules, weighting=weighting,
        target_parameters=target_parameters,
    )  # fmt: skip
    if single_pass and processes.running():
        raise ValueError(
            "sign_factors: single_pass: got True in several processes, want False: their gradients are summed"
        )
    for name, size in chosen.sizes.items():
        if 2 * r > min(size):
            raise ValueError(
                f"sign_factors: r: {name!r} is {size[0]}×{size[1]} and has fewer than 2r = {2 * r} singular triplets; "
                "want a smaller r, or leave it out with exclude_modules"
            )
    found = SignFactors(r, method, chosen.sizes, experts=list(chosen.experts))
    gradients = _Gradients(chosen.sizes)

    def finish(name: str) -> None:
        gradient = gradients.take(name, chosen.device_of(name))
        factors = None if gradient is None else _factors(gradient, r, method, split, rounds, seed)
        if factors is not None:
            (a, b, reached, took), lora_ga, start = factors
            counts = gradients.tokens[name], gradients.skipped[name]
            found.layers[name] = SignLayer(a.cpu(), b.cpu(), reached, lora_ga, start, took, *counts)

    names = chosen.names
    if single_pass:
        gradients.at_once = finish
        _run(chosen, names, passes, gradients.add, dropout)
    else:
        groups = range(0, len(names), layers_at_once)
        for first in progress.bar(groups, "sign(G)", len(groups), "pass"):
            group = names[first : first + layers_at_once]
            _run(chosen, group, passes, gradients.add, dropout)
            for name in group:
                finish(name)
    found.layers = {name: found.layers[name] for name in names if name in found.layers}  # backward came from the end
    return found


def _factors(
    gradient: Tensor, r: int, method: str, split: str, rounds: int, seed: int
) -> tuple[Found, float, float] | None:
    """What is found, f of LoRA-GA's factors, and f at the start; None for a gradient that is 0 or not finite.

    `gradient` is scaled in place, so that no dtype's range is left: signs stay.
    """
    largest = float(torch.linalg.vector_norm(gradient, math.inf))
    if not math.isfinite(largest) or largest == 0:
        return None
    gradient /= largest
    signs = Signs(gradient)
    u, _, vh, _ = linalg.truncated_svd(Matrix(gradient), 2 * r, seed=seed)
    plain = split_factors(u, vh, r, "ArB2r")
    lora_ga = objective(gradient, signs, *plain)
    if method == "svd":
        u, _, vh, _ = linalg.truncated_svd(signs, 2 * r, seed=seed)
        a, b = split_factors(u, vh, r, split, seed)
        reached = objective(gradient, signs, a, b)
        return Found(a, b, reached, 0), lora_ga, reached
    a, b = leading_factors(signs, r, seed)
    start = objective(gradient, signs, a, b)
    if lora_ga < start:
        (a, b), start = plain, lora_ga
    return minimise(gradient, signs, a, b, rounds), lora_ga, start


class _Gradients:
    """Σ weight·dYᵀX of the layers that are looked at now, in float32 (float64 for float64 models)."""

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        self.sizes = sizes
        self.sums: dict[str, Tensor] = {}
        self.tokens, self.skipped = Counter[str](), Counter[str]()
        self.at_once: Callable[[str], None] | None = None  # what to do with a layer as soon as it is there
        self.finished: set[str] = set()

    def add(self, name: str, x: Tensor, dy: Tensor, weight: float) -> None:
        """One call of one layer, seen in backward."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            if x.shape[0] == 0:
                return
            if name in self.finished:
                raise ValueError(
                    f"sign_factors: single_pass: {name!r} was called more than once, and its gradient is gone; want "
                    "single_pass=False"
                )
            if not bool(torch.isfinite(x).all() & torch.isfinite(dy).all()):
                self.skipped[name] += 1
                return
            dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
            if name not in self.sums:
                self.sums[name] = torch.zeros(self.sizes[name], dtype=dtype, device=dy.device)
            for start in range(0, x.shape[0], CHUNK):
                rows = slice(start, start + CHUNK)
                self.sums[name].addmm_(dy[rows].to(dtype).t(), x[rows].to(dtype), alpha=weight)
            self.tokens[name] += x.shape[0]
            if self.at_once is not None:
                self.finished.add(name)
                self.at_once(name)

    def take(self, name: str, device: torch.device) -> Tensor | None:
        """A layer's sum over all ranks, which is forgotten here; None where nothing was added."""
        gradient = self.sums.pop(name, None)
        if not processes.running():
            return gradient
        if gradient is None:
            gradient = torch.zeros(self.sizes[name], device=device)
        processes.add(gradient)
        self.tokens[name], self.skipped[name] = processes.added(self.tokens[name], self.skipped[name])
        return gradient


def _run(
    chosen: GradientSketch,
    names: list[str],
    passes: Callable[[], Any],
    add: Callable[[str, Tensor, Tensor, float], None],
    dropout: bool,
) -> None:
    """Calls `passes` with these layers watched."""
    model, modules = chosen._model, {name: chosen._modules[name] for name in names if name in chosen._modules}
    weights = {name: chosen.experts[name] for name in {name.rpartition("[")[0] for name in names} & set(chosen.experts)}

    def observe(name: str, x: Tensor, dy: Tensor, now: taps.Pass) -> None:
        if name in names:
            add(name, x, dy, chosen.weight_of(now))

    restore: list[Callable[[], object]] = []
    try:
        restore.append(taps.freeze(model))
        if not dropout:
            restore.append(taps.turn_dropout_off(model))
        others = functools.partial(experts.tap, weights, observe=observe)
        restore.append(taps.attach(model, modules, observe, others))
        passes()
    finally:
        while restore:
            restore.pop()()
