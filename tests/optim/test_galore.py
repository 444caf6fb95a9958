"""`GaLoreAdamW` against a dense reference in float64, and as an optimiser of torch's: schedules, states, groups."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from galore_problem import (
    PROJECTED,
    RANK,
    Net,
    backward,
    batch,
    difference,
    loss_of,
    net,
    optimizer_of,
    parameters_of,
    train,
)
from torch import Tensor, nn

from fastlora.optim import GaLoreAdamW, galore_param_groups
from fastlora.optim.galore.groups import MOMENTS
from fastlora.optim.galore.projector import PROJ_TYPES, side_of

MODES = ("plain", "hook", "factored")


def turned_over(moment: Tensor, old: Tensor, new: Tensor, squared: bool) -> Tensor:
    """The moment (r, ·) of rows that are oldᵀ times something, for newᵀ; written out from docs/details/galore.md."""
    c = new.T @ old
    if not squared:
        return c @ moment
    outside = 1 - (c * c).sum(dim=1, keepdim=True)
    return (c * c) @ moment + outside * moment.mean(dim=0, keepdim=True)


def reference(weight: Tensor, gradients: list[Tensor], proj_type: str, rank: int, gap: int, moments: str) -> Tensor:
    """W after these gradients, with full SVDs; lr 0.1, α 0.5, decay 0.1, β 0.9 and 0.99, ε 1e-8."""
    side = side_of(proj_type, *weight.shape)
    p = q = m = v = None
    for t, g in enumerate(gradients):
        if t % gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            new_p, new_q = u[:, :rank], vh[:rank].T
            if moments != "keep" and m is not None and v is not None:
                assert p is not None and q is not None
                if side in ("left", "full"):
                    m, turned = turned_over(m, p, new_p, False), turned_over(v, p, new_p, True)
                    v = turned if moments == "rotate" else v
                if side in ("right", "full"):
                    m, turned = turned_over(m.T, q, new_q, False).T, turned_over(v.T, q, new_q, True).T
                    v = turned if moments == "rotate" else v
            p, q = new_p, new_q
        assert p is not None and q is not None
        low = g if side == "right" else p.T @ g
        low = low if side == "left" else low @ q
        if side == "full" and t % gap == 0:
            low = torch.diag(low.diagonal())  # what else there is would be rounding
        m = 0.9 * (torch.zeros_like(low) if m is None else m) + 0.1 * low
        v = 0.99 * (torch.zeros_like(low) if v is None else v) + 0.01 * low**2
        n = (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.99 ** (t + 1))).sqrt() + 1e-8)
        weight = (1 - 0.1 * 0.1) * weight
        back = n if side == "right" else p @ n
        weight = weight - 0.1 * 0.5 * (back if side == "left" else back @ q.T)
    return weight


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (10, 10)], ids=str)
def test_steps_are_the_reference_s(shape, proj_type, moments):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(11)]
    weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    wanted = reference(weight.detach(), gradients, proj_type, 3, 4, moments)
    optimizer = GaLoreAdamW(
        [{"params": [weight], "rank": 3, "update_proj_gap": 4, "scale": 0.5, "proj_type": proj_type}],
        lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, refresh="svd", staggered=False,
        moments=moments,
    )  # fmt: skip
    start = weight.detach().clone()
    for g in gradients:
        weight.grad = g.clone()
        optimizer.step()
    assert torch.allclose(weight.detach(), wanted, rtol=1e-10, atol=1e-10)
    assert (wanted - start).norm() > 0.1 * start.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_a_rank_it_is_adamw_to_the_bit(decay, dtype):
    model, other = net(dtype), net(dtype)
    train(model, GaLoreAdamW(model.parameters(), lr=0.01, weight_decay=decay), 8)
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=decay, foreach=False), 8)
    assert torch.equal(parameters_of(model), parameters_of(other))
    ours, theirs = GaLoreAdamW(net().parameters()).defaults, torch.optim.AdamW(net().parameters()).defaults
    assert all(ours[key] == theirs[key] for key in ("lr", "betas", "eps", "weight_decay"))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_complex_parameters_without_a_rank_are_adamw_too(clip):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator, dtype=torch.complex64)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = GaLoreAdamW([mine], lr=0.1, weight_decay=0.1, max_grad_norm=clip)
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, foreach=False)
    for _ in range(4):
        mine.grad = torch.randn(5, 3, generator=generator, dtype=torch.complex64)
        theirs.grad = mine.grad.clone()
        optimizer.step()
        if clip is not None:
            nn.utils.clip_grad_norm_([theirs], clip)
        other.step()
        again = GaLoreAdamW([mine], lr=0.1, weight_decay=0.1, max_grad_norm=clip)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = again
    assert torch.equal(mine, theirs) and (mine - start).imag.norm() > 0.1


def test_only_the_groups_with_a_rank_are_projected():
    model, other = net(), net()
    optimizer = optimizer_of(model, weight_decay=0.0)
    whole = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    train(model, optimizer, 1)
    train(other, whole, 1)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-12) == (name not in PROJECTED), name
        start = net().get_parameter(name)
        change = (mine - start).detach()
        if name in PROJECTED:  # a step lies in r directions
            assert torch.linalg.matrix_rank(change, rtol=1e-9) == RANK
            assert optimizer.state[mine]["exp_avg"].shape[1] == RANK
        else:
            assert optimizer.state[mine]["exp_avg"].shape == mine.shape


# Refreshes.
def refreshed(optimizer: GaLoreAdamW, model: Any, steps: int) -> list[set[str]]:
    """The weights whose basis each step changed."""
    found = []
    for step in range(steps):
        before = {name: optimizer.state[model.get_parameter(name)].get("bases", 0) for name in PROJECTED}
        train(model, optimizer, 1, start=step)
        found.append({n for n in PROJECTED if optimizer.state[model.get_parameter(n)]["bases"] != before[n]})
    return found


@pytest.mark.parametrize("gradients", MODES)
def test_refreshes_are_spread_over_the_steps(gradients):
    model = net()
    optimizer = optimizer_of(model, {"update_proj_gap": 9}, gradients=gradients, refresh="subspace")
    found = refreshed(optimizer, model, 28)
    assert found[0] == set(PROJECTED)  # nothing has a basis yet
    assert all(len(names) <= 1 for names in found[1:])
    for i, name in enumerate(PROJECTED):  # the layers' phases differ by a third of the gap, and each keeps its own
        assert [t for t, names in enumerate(found) if name in names] == [0, *range(9 - 3 * i, 28, 9)]


def test_refreshes_on_the_same_step_on_request():
    model = net()
    found = refreshed(optimizer_of(model, {"update_proj_gap": 5}, staggered=False), model, 12)
    assert [t for t, names in enumerate(found) if names] == [0, 5, 10]
    assert all(not names or names == set(PROJECTED) for names in found)


def test_streamed_refreshes_start_after_two_steps_and_come_again():
    model = net()
    optimizer = optimizer_of(
        model, {"update_proj_gap": 10}, refresh="streamed", staggered=False, refresh_iterations=1, refresh_steps=2
    )
    start = {name: model.get_parameter(name).detach().clone() for name in PROJECTED}
    found = refreshed(optimizer, model, 2)
    assert found == [set(), set(PROJECTED)]  # half an iteration, then the other
    assert all(torch.equal(start[name], model.get_parameter(name)) for name in PROJECTED)
    found += refreshed(optimizer, model, 30)
    # Ten updates later a refresh begins, and takes four steps.
    assert [t for t, names in enumerate(found) if names] == [1, 14, 24]
    assert not any(torch.equal(start[name], model.get_parameter(name)) for name in PROJECTED)


def test_a_changed_gap_holds_from_the_next_refresh_on():
    model = net()
    optimizer = optimizer_of(model, {"update_proj_gap": 4}, staggered=False)
    found = refreshed(optimizer, model, 2)
    optimizer.param_groups[0]["update_proj_gap"] = 3
    found += refreshed(optimizer, model, 9)
    assert [t for t, names in enumerate(found) if names] == [0, 4, 7, 10]


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_streamed_refresh_refuses_what_is_not_finite_before_anything_moves(clip, proj_type, gradients):
    """In every step that adds to one: the step that begins it and the one that ends it too."""
    refused = 0
    for bad in range(14):
        model = net()
        settings: dict[str, Any] = {"gradients": gradients, "refresh": "streamed", "refresh_steps": 1}
        settings |= {"staggered": False, "max_grad_norm": clip}
        optimizer = optimizer_of(model, {"update_proj_gap": 3, "proj_type": proj_type}, **settings)
        train(model, optimizer, bad)
        loss = loss_of(model, *batch(bad))
        (loss * float("nan")).backward()
        before = copy.deepcopy((parameters_of(model), [dict(state) for state in optimizer.state.values()]))
        state = optimizer.state[model.square.weight]
        refreshes = not state or state["halves"] or state["step"] + 1 >= state["refresh_at"]
        if not refreshes:
            continue
        refused += 1
        with pytest.raises(ValueError, match="gradient: that of a projected weight is NaN or infinite in a step that"):
            optimizer.step()
        assert torch.equal(parameters_of(model), before[0]), bad
        for mine, kept in zip(optimizer.state.values(), before[1]):
            same = [torch.equal(v, kept[k]) if isinstance(v, Tensor) else v == kept[k] for k, v in mine.items() if kept]
            assert all(same), bad
        optimizer.zero_grad()
        train(model, optimizer, 3, start=bad)  # goes on without that batch
        assert torch.isfinite(parameters_of(model)).all() and not torch.equal(parameters_of(model), before[0])
    assert 4 < refused < 14


@pytest.mark.parametrize("refresh", ["subspace", "streamed"])
def test_layers_whose_gradient_is_zero_at_first(refresh):
    """As behind a projection that starts at zero: no basis is made of nothing, and the first gradient gives one."""
    model = net()
    with torch.no_grad():
        model.down.weight.zero_()
    optimizer = optimizer_of(model, {"update_proj_gap": 50}, refresh=refresh, staggered=False)
    train(model, optimizer, 6)
    state = optimizer.state[model.square.weight]
    u = torch.linalg.svd(state["exp_avg"])[1]
    assert state["bases"] == 1 and u[-1] > 0
    backward(model, 6)
    gradient = model.square.weight.grad
    held = (gradient @ state["basis"]).norm() / gradient.norm()
    assert held > 0.6  # of the twenty directions, four


# Clipping.
@pytest.mark.parametrize("gradients", MODES)
def test_clipping(gradients):
    model, clipped = net(), net()
    settings = {"gradients": gradients, "refresh": "streamed"}
    optimizer, other = optimizer_of(model, **settings), optimizer_of(clipped, **settings, max_grad_norm=1e-3)
    for step in range(4):
        train(model, optimizer, 1, start=step)
        train(clipped, other, 1, start=step)
    assert other.grad_norm is not None and optimizer.grad_norm is None
    assert 1e-3 < float(other.grad_norm) < 10
    norms = [torch.stack([s["exp_avg"].norm() for s in o.state.values()]).norm() for o in (other, optimizer)]
    assert norms[0] < 1e-3 < norms[1]  # an average of gradients of at most 1e-3
    unclipped = net()
    train(unclipped, optimizer_of(unclipped, **settings, max_grad_norm=1e3), 4)
    assert torch.equal(parameters_of(unclipped), parameters_of(model))


def test_the_norm_is_that_of_r_and_the_other_gradients():
    model = net()
    optimizer = optimizer_of(model, max_grad_norm=1e3)
    backward(model, 0)
    total = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        s = torch.linalg.svdvals(parameter.grad)[:RANK] if name in PROJECTED else parameter.grad
        total += s.square().sum()
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert float(optimizer.grad_norm) == pytest.approx(float(total.sqrt()), rel=1e-3)


# As an optimiser of torch's.
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("refresh", ["subspace", "streamed"])
@pytest.mark.parametrize("stop", [3, 7, 8, 9])  # in the middle of streamed refreshes too
def test_a_run_that_is_reloaded_goes_on_to_the_same_bits(stop, refresh, gradients):
    settings = {"gradients": gradients, "refresh": refresh, "refresh_steps": 2}
    model = net(torch.bfloat16)
    optimizer = optimizer_of(model, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, stop)
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = net(torch.bfloat16)
    again.load_state_dict(weights)
    reloaded = optimizer_of(again, {"update_proj_gap": 99, "scale": 7.0}, **settings)
    train(copy.deepcopy(again), reloaded, 0)
    backward(again, 77)  # what it has of another step is forgotten
    again.zero_grad()
    reloaded.load_state_dict(state)
    for mine, theirs in zip(optimizer.state.values(), reloaded.state.values(), strict=True):
        for key, value in mine.items():
            same = torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
            assert same and (not isinstance(value, Tensor) or value.dtype == theirs[key].dtype == torch.float32), key
    train(model, optimizer, 6, start=stop)
    train(again, reloaded, 6, start=stop)
    assert torch.equal(parameters_of(model), parameters_of(again))
    assert difference(model, net(torch.bfloat16)) > 1e-2


def test_groups_may_be_added_and_have_settings_of_their_own():
    model = net()
    optimizer = GaLoreAdamW(
        [
            {"params": [model.up.weight], "rank": 2, "proj_type": "left"},
            {"params": [model.square.weight], "rank": 5, "lr": 0.0, "refresh": "svd"},
        ],
        lr=0.01,
    )
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": list(model.down.parameters())})
    optimizer.add_param_group({"params": [model.norm.weight], "betas": (0.8, 0.9)})
    before = net()
    train(model, optimizer, 3, start=3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {"up.weight", "down.weight", "down.bias", "norm.weight"}
    assert optimizer.state[model.up.weight]["basis"].shape == (20, 2)
    assert optimizer.state[model.square.weight]["basis"].shape == (20, 5)
    assert [group.get("rank") for group in optimizer.param_groups] == [2, 5, None, None]


@pytest.mark.parametrize("gradients", MODES)
def test_groups_added_later_use_the_same_mode(gradients):
    model, whole = net(), net()
    optimizer = optimizer_of(whole, gradients=gradients, refresh="streamed")
    later = GaLoreAdamW(
        [{"params": [model.up.weight, model.square.weight], "rank": RANK, "update_proj_gap": 6, "scale": 1.0}],
        lr=1e-2, gradients=gradients, model=model, refresh="streamed",
    )  # fmt: skip
    later.add_param_group({"params": [model.down.weight], "rank": RANK, "update_proj_gap": 6, "scale": 1.0})
    later.add_param_group({"params": [model.embedding.weight]})
    later.add_param_group({"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0})
    train(whole, optimizer, 8)
    train(model, later, 8)
    assert difference(model, whole) < 1e-12
    assert (model.down.weight.grad is None) and model.down.weight.requires_grad == (gradients != "factored")


@pytest.mark.parametrize("gradients", MODES)
def test_closures(gradients):
    model, other = net(), net()
    settings = {"gradients": gradients, "refresh": "streamed"}
    optimizer, plain = optimizer_of(model, **settings), optimizer_of(other, **settings)
    losses = []
    for step in range(5):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, *batch(step))
            loss.backward()
            return loss.item()

        losses.append(optimizer.step(closure))
    assert losses == train(other, plain, 5)
    assert torch.equal(parameters_of(model), parameters_of(other))


@pytest.mark.parametrize("gradients", MODES)
def test_parameters_without_a_gradient_are_left_alone(gradients):
    class Gated(Net):
        gate = True

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = torch.tanh(self.up(self.embedding(tokens)))
            return self.down(hidden + torch.tanh(self.square(self.norm(hidden))) if self.gate else hidden)

    model = net(kind=Gated)
    optimizer = optimizer_of(model, gradients=gradients, refresh="streamed")
    train(model, optimizer, 5)
    model.gate = False
    state = copy.deepcopy(optimizer.state[model.square.weight])
    before = model.square.weight.detach().clone(), model.up.weight.detach().clone()
    train(model, optimizer, 3, start=5)
    assert torch.equal(model.square.weight, before[0]) and not torch.equal(model.up.weight, before[1])
    for key, value in optimizer.state[model.square.weight].items():
        assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key]
    model.gate = True
    train(model, optimizer, 1, start=8)
    assert not torch.equal(model.square.weight, before[0])


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_a_copied_run_goes_on_to_the_same_numbers(way, gradients):
    """In the plain mode: clipped and drawn as before, and with weights that autograd sees again."""
    model = net()
    settings: dict[str, Any] = {"gradients": gradients, "refresh": "streamed", "max_grad_norm": 0.05, "seed": 7}
    optimizer = optimizer_of(model, weight_decay=0.0, **settings)
    train(model, optimizer, 4)
    other, copied = way((model, optimizer))
    assert (copied.max_grad_norm, copied.seed, copied.gradients) == (0.05, 7, "plain")
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert model.up.weight.requires_grad == (gradients != "factored")
    train(model, optimizer, 9, start=4)
    train(other, copied, 9, start=4)
    assert difference(other, model) < 1e-12


@pytest.mark.parametrize("refusal", ["nan", "sparse"])
def test_what_a_refused_step_read_is_not_kept_for_the_next(refusal):
    """`model.zero_grad()` is enough: the optimiser holds nothing that p.grad does not."""

    class WithTable(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 3, sparse=True)

    model, other = net(kind=WithTable), net(kind=WithTable)
    groups = [{"params": [m.up.weight, m.square.weight], "rank": RANK} for m in (model, other)]
    optimizer, calm = (
        GaLoreAdamW([group, {"params": [m.table.weight]}], lr=0.1) for group, m in zip(groups, (model, other))
    )
    backward(model, 0)
    if refusal == "nan":
        model.square.weight.grad.fill_(float("nan"))
    else:
        model.table(torch.tensor([1, 2])).sum().backward()
    start = parameters_of(model).clone()
    with pytest.raises(ValueError, match="NaN or infinite" if refusal == "nan" else "got a sparse gradient"):
        optimizer.step()
    model.zero_grad()
    assert torch.equal(parameters_of(model), start)
    for each, run in ((model, optimizer), (other, calm)):
        each.square.weight.grad = torch.ones_like(each.square.weight)  # `up` has no gradient in this step
        run.step()
        each.zero_grad()
    assert torch.equal(model.up.weight, net(kind=WithTable).up.weight)
    assert torch.allclose(model.square.weight, other.square.weight, atol=1e-9)
    assert not torch.equal(model.square.weight, net(kind=WithTable).square.weight)
    backward(model, 1)
    optimizer.step()


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("where", ["backward", "step"])
@pytest.mark.parametrize("refresh", ["subspace", "streamed"])
def test_states_and_projections_are_float32_under_autocast(refresh, where, gradients):
    """The gradients are those of the backward pass outside of it, and so are all numbers."""
    models = []
    for inside in ("", where):
        model = net(torch.float32)
        optimizer = optimizer_of(model, gradients=gradients, refresh=refresh, refresh_steps=1)
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, *batch(step))
                if inside == "backward":
                    loss.backward()
            if inside != "backward":
                loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside == "step"):
                optimizer.step()
            optimizer.zero_grad()
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        assert {value.dtype for value in kept} == {torch.float32}
        models.append(model)
        optimizer.release()
    assert torch.equal(parameters_of(models[0]), parameters_of(models[1]))


def test_a_closure_runs_under_the_autocast_around_step():
    model = net(torch.float32)
    optimizer, seen = optimizer_of(model), []

    def closure() -> float:
        loss = loss_of(model, *batch(0))
        seen.append(model.down(torch.ones(20)).dtype)
        loss.backward()
        return loss.item()

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    assert seen == [torch.bfloat16]


def test_a_scaler_in_float16_is_refused_where_it_cannot_unscale():
    for gradients in MODES:
        model = net(torch.float32)
        optimizer, scaler = optimizer_of(model, gradients=gradients), torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, *batch(0))).backward()
        if gradients == "plain":
            scaler.step(optimizer)
            assert difference(model, net(torch.float32)) > 1e-4
            continue
        with pytest.raises(
            ValueError, match=f"step: got gradients that a GradScaler scaled, with gradients='{gradients}'"
        ):
            scaler.step(optimizer)
        optimizer.zero_grad()
        backward(model, 0)
        optimizer.step()  # what the scaler said is not said of every step from then on
        # Unscaled by hand, which reaches p.grad alone.
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, *batch(0))).backward()
        scaler.unscale_(optimizer)
        with pytest.raises(ValueError, match="step: got gradients that a GradScaler scaled"):
            scaler.step(optimizer)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"gradients": "off"}, "gradients: got 'off', want one of 'plain', 'hook', 'factored'"),
    ({"gradients": "factored"}, "model: got NoneType with gradients='factored', want the torch.nn.Module"),
    ({"gradients": "factored", "model": nn.Linear(3, 3)}, "model: none of the 3 projected weights is in this Linear"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0, want a positive number or None"),
    ({"lr": -1.0}, "lr: got -1.0, want a number that is not negative"),
    ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\), want two numbers in \[0, 1\)"),
    ({"refresh": "often"}, "refresh: got 'often', want one of 'subspace', 'svd', 'streamed'"),
    ({"moments": "reset"}, "moments: got 'reset', want one of 'rotate_first', 'rotate', 'keep'"),
    ({"optim_bits": 4}, "optim_bits: got 4, want one of 32, 8"),
    ({"refresh_steps": 0}, "refresh_steps: got 0, want an integer of at least 1"),
    ({"arithmetic": "new"}, "arithmetic: got 'new', want one of 'torch', 'official'"),
]


@pytest.mark.parametrize("settings, message", BAD, ids=[str(settings) for settings, _ in BAD])
def test_errors_of_arguments(settings, message):
    with pytest.raises(ValueError, match="GaLoreAdamW: " + message):
        GaLoreAdamW(galore_param_groups(net(), RANK), **settings)


def test_errors_of_groups():
    model = net()
    optimizer = GaLoreAdamW([model.up.weight])
    for group, message in (
        ({"params": [model.down.bias], "rank": 2}, r"params: got torch.float64 of shape \(9,\) in a group with a rank"),
        ({"params": [model.down.weight], "rank": 10}, r"rank: got 10 for a weight \(9, 20\), want at most 9"),
        ({"params": [model.down.weight], "rank": 2, "proj_type": "up"}, "proj_type: got 'up', want one of 'std'"),
        ({"params": [model.down.weight], "rank": 0}, "rank: got 0, want an integer of at least 1"),
        ({"params": [model.down.weight], "rank": 2, "scale": float("nan")}, "scale: got nan"),
        ({"params": [model.down.weight], "rank": 2, "update_proj_gap": 0}, "update_proj_gap: got 0, want an integer"),
    ):
        with pytest.raises(ValueError, match="GaLoreAdamW: " + message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(
        ValueError, match="refresh: got 'svd' with gradients='factored', where no gradient is ever whole"
    ):
        optimizer_of(model, gradients="factored", refresh="svd")
    assert all(parameter.requires_grad for parameter in model.parameters())


SAVED = [
    (
        {"refresh": "svd"},
        {"gradients": "factored"},
        ": refresh: got 'svd' with gradients='factored', where no gradient",
    ),
    ({"rank": 99}, {}, r": rank: got 99 for a weight \(20, 12\), want at most 12"),
    ({"rank": None}, {"gradients": "hook"}, r"\.load_state_dict: rank: got None for a group that has 4, want the same"),
    ({"moments": "reset"}, {}, ": moments: got 'reset', want one of"),
]


@pytest.mark.parametrize("saved, own, message", SAVED, ids=[str(saved) for saved, *_ in SAVED])
def test_saved_groups_that_cannot_be_trained_here_are_refused(saved, own, message):
    other, model = net(), net()
    given, optimizer = optimizer_of(other), optimizer_of(model, **own)
    train(other, given, 3)
    train(model, optimizer, 2)
    state = given.state_dict()
    state["param_groups"][0] |= saved
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="GaLoreAdamW" + message):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    train(model, optimizer, 3, start=2)  # with what it had
