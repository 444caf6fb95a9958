"""StreamingSketch against the exact sum of the micro-batches' gradients and its singular values in float64."""

import math

import pytest
import torch
from largest import Largest
from torch import Tensor

from fastlora.init import StreamingSketch
from fastlora.init.streaming import SKETCHES

N, M, WIDTH, RANK = 70, 90, 32, 8
Batches = list[tuple[Tensor, Tensor, float]]


def micro_batches(count: int = 6, tokens: int = 50, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batches:
    """(X, dY, weight) with a decaying spectrum that the micro-batches share in part, as gradients do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mix_x, mix_y = draw(40, M), draw(40, N)
    decay = 0.93 ** torch.arange(40)
    batches = []
    for i in range(count):
        t = tokens + 7 * i
        hidden = draw(t, 40) * decay
        x = hidden @ mix_x + 0.3 * draw(t, M)
        dy = (hidden + 0.3 * draw(t, 40)) @ mix_y + 0.3 * draw(t, N)
        batches.append((x.to(dtype), dy.to(dtype), 1.0 + i))
    return batches


def exact_sum(batches: Batches) -> Tensor:
    return torch.stack([w * dy.double().t() @ x.double() for x, dy, w in batches]).sum(0)


def sketch_of(batches: Batches, width: int = WIDTH, seed: int = 0) -> StreamingSketch:
    sketch = StreamingSketch(N, M, width, seed)
    for batch in batches:
        sketch.update(*batch)
    return sketch


def excess(sketch: StreamingSketch, g: Tensor, rank: int = 2 * RANK) -> float:
    """The error of the sketch's rank-`rank` approximation over that of the best one."""
    u, s, vh = (part.double() for part in sketch.svd(rank))
    best = torch.linalg.svdvals(g)[rank:].norm()
    return ((g - (u * s) @ vh).norm() / best).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_factors_are_those_of_the_summed_gradient(dtype):
    batches = micro_batches(dtype=dtype)
    g, sketch = exact_sum(batches), sketch_of(batches)
    u, s, vh = sketch.svd(2 * RANK)
    expected = torch.linalg.svdvals(g)
    assert torch.allclose(s.double(), expected[: 2 * RANK], rtol=2e-2, atol=1e-3 * expected[0].item())
    assert excess(sketch, g) < 1.02
    for gram in (u.t() @ u, vh @ vh.t()):
        assert torch.allclose(gram, torch.eye(2 * RANK), atol=1e-5)
    assert (sketch.tokens, sketch.updates, sketch.skipped) == (sum(50 + 7 * i for i in range(6)), 6, 0)


def test_one_micro_batch_is_exact():
    batches = micro_batches(count=1, tokens=20)  # fewer tokens than columns: the sketch holds all of it
    g, sketch = exact_sum(batches), sketch_of(batches)
    q, z = sketch.factors()
    assert torch.allclose((q @ z.t()).double(), g, atol=1e-5 * g.abs().max().item())


def test_few_tokens_at_a_time_add_up():
    """Rank-deficient sums at first: what has no content must not stand in the way of later micro-batches."""
    pieces = [
        (x[i : i + 3], dy[i : i + 3], w) for x, dy, w in micro_batches(count=2) for i in range(0, len(x), 3)
    ]  # 36 updates of three tokens
    g = exact_sum(pieces)
    assert excess(sketch_of(pieces), g) < 1.05


@pytest.mark.parametrize("nothing", ["no tokens", "zero gradient"])
def test_micro_batches_without_gradient_change_nothing(nothing):
    batches = micro_batches(count=3)
    empty = (
        torch.zeros(0 if nothing == "no tokens" else 40, M),
        torch.zeros(0 if nothing == "no tokens" else 40, N),
        1.0,
    )
    sketch = sketch_of([empty, *batches[:1], empty, *batches[1:], empty])
    assert excess(sketch, exact_sum(batches)) < 1.02
    only_empty = sketch_of([empty])
    assert not only_empty.has_gradient and sketch.has_gradient


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_non_finite_micro_batches_are_skipped_and_counted(value, where):
    batches = micro_batches(count=3)
    x, dy, weight = batches[0][0].clone(), batches[0][1].clone(), batches[0][2]
    (x if where == "x" else dy)[5, 7] = value
    sketch = sketch_of([*batches[:2], (x, dy, weight), *batches[2:]])
    assert (sketch.skipped, sketch.updates) == (1, 3)
    assert torch.equal(sketch.z, sketch_of(batches).z)
    all_skipped = sketch_of([(x, dy, weight)])
    assert all_skipped.skipped == 1 and not all_skipped.has_gradient


@pytest.mark.parametrize("loss_scale", [1e-25, 1e-10, 65536.0, 1e15])
def test_the_factors_do_not_depend_on_the_loss_scale(loss_scale):
    batches = micro_batches(count=3)
    plain = sketch_of(batches).svd(2 * RANK)
    scaled = sketch_of([(x, dy * loss_scale, w) for x, dy, w in batches]).svd(2 * RANK)
    assert torch.allclose(scaled[1] / loss_scale, plain[1], rtol=1e-4)
    assert torch.allclose((scaled[0] * plain[0]).sum(0).abs(), torch.ones(2 * RANK), atol=1e-3)
    assert torch.allclose((scaled[2] * plain[2]).sum(1).abs(), torch.ones(2 * RANK), atol=1e-3)


def test_the_seed_alone_decides():
    batches = micro_batches()
    one, same, other = (sketch_of(batches, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.z, same.z) and torch.equal(one.q, same.q) and torch.equal(one.probed, same.probed)
    assert not torch.equal(one.z, other.z)


def test_refining_closes_most_of_the_gap():
    batches = micro_batches(count=8)
    g, sketch = exact_sum(batches), sketch_of(batches, width=20)
    before = excess(sketch, g)
    sketch.start_refining()
    assert excess(sketch, g) == before  # nothing has been added yet
    for batch in batches:
        sketch.update(*batch)
    assert sketch.updates == 8 and sketch.refined_updates == 8
    assert before > 1.003
    assert excess(sketch, g) - 1 < 0.25 * (before - 1)


def test_refining_a_gradient_of_lower_rank_than_the_sketch():
    batches = micro_batches(count=2, tokens=5)  # rank 17 of 32
    g, sketch = exact_sum(batches), sketch_of(batches)
    sketch.start_refining()
    for batch in batches:
        sketch.update(*batch)
    q, z = sketch.factors()
    assert torch.allclose((q @ z.t()).double(), g, atol=1e-4 * g.abs().max().item())


@pytest.mark.parametrize("refined", [False, True])
def test_the_norm_is_estimated_with_what_the_sketch_misses(refined):
    batches = micro_batches()
    g, sketch = exact_sum(batches), sketch_of(batches, width=8)
    if refined:
        sketch.start_refining()
        for batch in batches:
            sketch.update(*batch)
    squared = g.square().sum().item()
    held = sketch.z.double().square().sum().item()
    assert held < 0.99 * squared  # so the probes have something to say
    assert abs(sketch.squared_norm() - squared) < 0.3 * (squared - held)


@pytest.mark.parametrize("shape", [(4, 90), (90, 4), (1, 1), (6, 6)], ids=str)
def test_layers_narrower_than_the_sketch_are_held_whole(shape):
    generator = torch.Generator().manual_seed(0)
    n, m = shape
    sketch = StreamingSketch(n, m, WIDTH, seed=0)
    batches = [(torch.randn(9, m, generator=generator), torch.randn(9, n, generator=generator), 1.0) for _ in range(3)]
    for batch in batches:
        sketch.update(*batch)
    g = exact_sum(batches)
    q, z = sketch.factors()
    assert sketch.width == min(n, m)
    assert torch.allclose((q @ z.t()).double(), g, atol=1e-5 * g.abs().max().item())


def test_merged_sketches_are_the_sketch_of_all_data():
    batches = micro_batches(count=8)
    g = exact_sum(batches)
    first, second = sketch_of(batches[:4], width=48), sketch_of(batches[4:], width=48)
    first.merge(second)
    assert excess(first, g) < 1.02
    assert torch.allclose(first.probed, sketch_of(batches).probed, rtol=1e-3, atol=1e-2)
    assert first.updates == 8 and first.tokens == sum(50 + 7 * i for i in range(8))


def test_nothing_of_the_weights_size_is_allocated():
    n = m = 256
    generator = torch.Generator().manual_seed(0)
    sketch = StreamingSketch(n, m, WIDTH, seed=0)
    tokens = 40
    with Largest() as largest:
        for refining in (False, True):
            if refining:
                sketch.start_refining()
            for _ in range(2):
                x, dy = (torch.randn(tokens, size, generator=generator) for size in (m, n))
                sketch.update(x.bfloat16(), dy.bfloat16(), 1.0)
        sketch.svd(16)
        sketch.squared_norm()
    assert 0 < largest.elements <= max(tokens, WIDTH) * n < n * m
    assert sketch.nbytes == 4 * WIDTH * (n + m) + 32 * n + 4 * WIDTH * (n + 2 * m)  # what the docstrings say


# Micro-batches that cancel.
def share(sketch: StreamingSketch, g: Tensor) -> float:
    """What LoRA-GA's first step can follow of G (ArB2r), as a share of what the best factors can."""
    u, _, vh = (part.double() for part in sketch.svd(2 * RANK))
    a, b = vh[:RANK], u[:, RANK:]
    left, right = b @ (b.t() @ g), (g @ a.t()) @ a
    reached = (left + right - (left @ a.t()) @ a).norm().square()
    return (reached / torch.linalg.svdvals(g)[: 2 * RANK].square().sum()).item()


def flat_batches(weights: list[float], seed: int = 5) -> Batches:
    """Of flat spectrum: what a sketch cuts off a micro-batch is no small part of it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((400, 192), (400, 256))
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) + (w,) for w in weights]  # type: ignore[misc]


def cancelling(kind: str) -> Batches:
    if kind == "+G -G small":
        first, last = flat_batches([1.0, 0.02])
        return [first, (first[0], first[1], -1.0), last]
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(1))
    return flat_batches((advantages - advantages.mean()).tolist())


def sketched_by(accumulate: str, batches: Batches, width: int = 48) -> StreamingSketch:
    sketch = SKETCHES[accumulate](batches[0][1].shape[1], batches[0][0].shape[1], width, 0)
    for number, batch in enumerate(batches):
        sketch.update(*batch, number=number)
    return sketch


def test_a_sketch_of_what_cancelled_says_so_and_refining_finds_it():
    """The residue of +G and -G, which the sketch cut, is not what it says that it holds."""
    batches = cancelling("+G -G small")
    g, sketch = exact_sum(batches), sketched_by("sum", batches)
    u, s, vh = sketch.svd(2 * RANK)
    held = (u.double().t() @ g).square().sum() / g.square().sum()
    assert s.double().square().sum() > 3 * held * g.square().sum()  # by its own singular values it holds far more
    measured = sketch.measure(u, s, vh)
    assert measured.drift > 1
    assert measured.captured == pytest.approx(held.item(), rel=0.35)  # 8 probes
    assert math.sqrt(measured.squared_norm) == pytest.approx(g.norm().item(), rel=0.25)
    for _ in range(3):
        sketch.start_refining()
        for batch in batches:
            sketch.update(*batch)
    u, s, vh = sketch.svd(2 * RANK)
    held = (u.double().t() @ g).square().sum() / g.square().sum()
    assert sketch.measure(u, s, vh).captured == pytest.approx(held.item(), rel=0.1)
    assert share(sketch, g) > 0.8 and sketch.measure(u, s, vh).drift < 0.3


@pytest.mark.parametrize("kind, least", [("+G -G small", 0.6), ("advantages", 0.6)])
def test_a_signed_sketch_keeps_what_is_left(kind, least):
    batches = cancelling(kind)
    g, plain, signed = exact_sum(batches), sketched_by("sum", batches), sketched_by("signed", batches)
    assert share(signed, g) > max(least, share(plain, g) - 1e-6)
    u, s, vh = signed.svd(2 * RANK)
    held = (u.double().t() @ g).square().sum() / g.square().sum()
    assert signed.measure(u, s, vh).captured == pytest.approx(held.item(), rel=0.2)


def test_a_signed_sketch_of_what_does_not_cancel_is_the_plain_one():
    batches = micro_batches()
    plain, signed = sketched_by("sum", batches, WIDTH), sketched_by("signed", batches, WIDTH)
    assert all(torch.equal(one, other) for one, other in zip(plain.svd(8), signed.svd(8)))
    assert signed.nbytes > plain.nbytes


@pytest.mark.parametrize("kind", ["+G -G small", "advantages", "decaying"])
def test_components_are_those_of_the_stacked_gradients(kind):
    batches = micro_batches() if kind == "decaying" else cancelling(kind)
    sketch = sketched_by("components", batches)
    gradients = [w * dy.double().t() @ x.double() for x, dy, w in batches]
    u, s, vh = (part.double() for part in sketch.svd(2 * RANK))
    for found, parts in ((u, gradients), (vh.t(), [g.t() for g in gradients])):
        stacked = torch.cat(parts, dim=1)  # Σ GᵢGᵢᵀ is its product with its transpose
        best = torch.linalg.svdvals(stacked)[: 2 * RANK].square().sum()
        assert (found.t() @ stacked).square().sum() > (0.995 if kind == "decaying" else 0.95) * best
    energy = torch.stack([g.square().sum() for g in gradients]).sum()
    held = (u.t() @ torch.cat(gradients, dim=1)).square().sum() / energy
    assert 0.8 * held < sketch.measure(u, s, vh).captured < 1.02 * held  # what was cut off on the way counts as missed
    assert sketch.squared_norm() == pytest.approx(energy.item(), rel=0.05)


def test_calls_of_one_pass_are_one_gradient_among_the_components():
    batches = micro_batches(count=4, tokens=20)
    calls = SKETCHES["components"](N, M, 64, 0)
    for number, batch in zip((3, 3, 9, 9), batches):
        calls.update(*batch, number=number)
    gradients = [exact_sum(batches[:2]), exact_sum(batches[2:])]
    gram = sum(g @ g.t() for g in gradients)
    values = torch.linalg.eigvalsh(gram).flip(0)[:8].sqrt()
    assert torch.allclose(calls.svd(8)[1].double(), values, rtol=1e-3)
    other = SKETCHES["components"](N, M, 64, 0)
    for batch in batches[2:]:
        other.update(*batch, number=5)
    one = SKETCHES["components"](N, M, 64, 0)
    for batch in batches[:2]:
        one.update(*batch, number=1)
    one.merge(other)
    assert torch.allclose(one.svd(8)[1].double(), values, rtol=1e-3)
