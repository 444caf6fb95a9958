"""Two gloo processes with different data give the sketch of one process with all of it."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch import Tensor, nn

from fastlora import GradientSketch, init_lora_ga, sign_factors

R, WIDTH = 2, 16  # of layers 24 to 40 wide
DISCOUNT = 0.3


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 61, (2, 5 + 2 * i), generator=generator) for i in range(4)]


def run(model: nn.Module, sketch: GradientSketch, tokens: list[Tensor]) -> None:
    for ids in tokens:
        model(input_ids=ids, labels=ids).loss.backward()


def process(rank: int, folder: str) -> None:
    """One of two processes: two batches each, in two contexts, then the same again to refine."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_model("llama")
    mine = batches()[rank::2]
    sketch = GradientSketch(model, r=R, width=WIDTH)
    for ids in mine:  # each time it is left, what the processes have becomes one, and must not be added twice
        with sketch:
            run(model, sketch, [ids])
    torch.save(results(sketch), f"{folder}/first-{rank}")
    with sketch.refine():
        run(model, sketch, mine)
    torch.save(results(sketch), f"{folder}/refined-{rank}")
    discounted = GradientSketch(model, r=R, width=WIDTH, discount=DISCOUNT)
    in_steps(discounted, mine, f"{folder}/discounted-{rank}")
    in_steps(discounted.refine(), mine, f"{folder}/discounted-refined-{rank}")
    if rank == 0:
        discounted.step()
    with pytest.raises(ValueError, match=r"step: the processes made \[2, 1\] steps"), discounted:
        pass
    factors = sign_factors(model, lambda: run(model, sketch, mine), r=R, target_modules=["v_proj"], layers_at_once=2)
    torch.save(
        {name: (line.a, line.b, line.objective, line.tokens) for name, line in factors.layers.items()},
        f"{folder}/sign-{rank}",
    )
    with pytest.raises(ValueError, match="single_pass: got True in several processes"):
        sign_factors(model, lambda: None, r=R, single_pass=True)
    sizes = init_lora_ga(model, sketch)
    torch.save((dict(sizes), model.state_dict()), f"{folder}/model-{rank}")
    dist.destroy_process_group()


def in_steps(sketch: GradientSketch, tokens: list[Tensor], path: str) -> None:
    """An optimiser step after each batch; the context is left between two of them (and the ranks merge)."""
    for i, ids in enumerate(tokens):
        with sketch:
            run(sketch._model, sketch, [ids])
        if i < len(tokens) - 1:
            sketch.step()
    torch.save((results(sketch), sketch.total_weight), path)


def results(sketch: GradientSketch) -> dict:
    return {
        name: (*layer.factors(), layer.probed, layer.tokens, layer.updates, layer.skipped)
        for name, layer in sketch.layers.items()
    }


def exact_gradients(names: list[str], counts: tuple[float, ...] = (1, 1, 1, 1)) -> dict[str, Tensor]:
    model = tiny_model("llama").double()
    weights = [model.get_submodule(name).weight for name in names]
    sums = [torch.zeros_like(weight) for weight in weights]  # type: ignore[arg-type]
    for ids, count in zip(batches(), counts):
        loss = model(input_ids=ids, labels=ids).loss * count
        for total, grad in zip(sums, torch.autograd.grad(loss, weights)):  # type: ignore[arg-type]
            total += grad
    return dict(zip(names, sums))


@pytest.mark.slow
def test_two_processes_are_one():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (folder,), nprocs=2)  # type: ignore[attr-defined]
        load = {path.name: torch.load(path, weights_only=True) for path in Path(folder).glob("*-?")}
    for kind in ("first", "refined"):  # both processes have the same, bit for bit
        for name, mine in load[f"{kind}-0"].items():
            for ours, theirs in zip(mine, load[f"{kind}-1"][name]):
                assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    for ours, theirs in zip(load["model-0"][1].values(), load["model-1"][1].values()):
        assert torch.equal(ours, theirs)
    assert load["model-0"][0] == load["model-1"][0]
    alone = GradientSketch(tiny_model("llama"), r=R, width=WIDTH)
    with alone:
        run(alone._model, alone, batches())
    for kind, bound in (("first", 1.02), ("refined", 1.002)):
        for name, g in exact_gradients(alone.names).items():
            q, z, probed, tokens, updates, skipped = load[f"{kind}-0"][name]
            u, s, vh = torch.linalg.svd(z.t().double(), full_matrices=False)
            approximation = q.double() @ (u[:, : 2 * R] * s[: 2 * R]) @ vh[: 2 * R]
            best = torch.linalg.svdvals(g)[2 * R :].norm()
            assert (g - approximation).norm() < bound * best, (kind, name)
            layer = alone.layers[name]
            assert torch.allclose(probed, layer.probed, atol=1e-5 * layer.probed.abs().max().item())
            assert (tokens, updates, skipped) == (layer.tokens, layer.updates, 0)
    check_discounted(load, alone.names)
    check_signs(load)


def check_signs(load: dict) -> None:
    """The gradients were summed over the processes."""
    assert len(load["sign-0"]) == 2
    exact = exact_gradients(list(load["sign-0"]))
    for name, (a, b, objective, tokens) in load["sign-0"].items():
        theirs = load["sign-1"][name]
        assert torch.equal(a, theirs[0]) and torch.equal(b, theirs[1]) and objective == theirs[2]
        assert tokens == sum(ids.numel() for ids in batches())
        wanted = torch.sign(exact[name])
        step = (
            b.double() @ torch.sign(b.double().t() @ exact[name])
            + torch.sign(exact[name] @ a.double().t()) @ a.double()
        )
        missed = 1 - (step * wanted).sum() ** 2 / (step.square().sum() * wanted.square().sum())
        assert objective == pytest.approx(missed.item(), abs=5e-3)


def check_discounted(load: dict, names: list[str]) -> None:
    """Each process had one batch in each of two steps: the first step's are the first two."""
    counts = (DISCOUNT, DISCOUNT, 1.0, 1.0)
    exact = exact_gradients(names, counts)
    for kind, bound in (("discounted", 1.02), ("discounted-refined", 1.002)):
        (mine, weight), (theirs, other_weight) = load[f"{kind}-0"], load[f"{kind}-1"]
        assert weight == other_weight == pytest.approx(sum(counts))
        for name, g in exact.items():
            assert torch.equal(mine[name][0], theirs[name][0]) and torch.equal(mine[name][1], theirs[name][1])
            u, s, vh = torch.linalg.svd(mine[name][1].t().double(), full_matrices=False)
            approximation = mine[name][0].double() @ (u[:, : 2 * R] * s[: 2 * R]) @ vh[: 2 * R]
            best = torch.linalg.svdvals(g)[2 * R :].norm()
            assert (g - approximation).norm() < bound * best, (kind, name)
