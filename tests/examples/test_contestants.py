"""Every contestant trains what its name says, and as its name says: parameters, rates, ranks, starts, optimisers."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from study import costs
from study import learner as learners
from study.contestants import CONTESTANTS
from study.learner import Learner
from tiny_examples import digits_task

import fastlora

R = 4
SIZES = ((256, 64), (256, 256), (10, 256))  # (out, in) of the MLP's layers
PER_RANK = sum(n + m for n, m in SIZES)
STEPS = 20


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return digits_task(tmp_path_factory.mktemp("digits"), "--sketch-batches", "2")


@pytest.fixture(scope="module")
def trained(task):
    """Each contestant after the same few steps: (learner, its parameters before, its losses)."""
    found = {}
    for name, entry in CONTESTANTS.items():
        learner = Learner(task, entry, 0.01, seed=0, steps=STEPS)
        before = {key: value.detach().clone() for key, value in learner.model.named_parameters()}
        losses = [learner.step(task.shares(indices)) for indices in task.order(0, STEPS)]
        found[name] = learner, before, losses
    return found


def kinds(learner):
    """What is trained, by the name that holds it."""
    trained = (name for name, parameter in learner.model.named_parameters() if parameter.requires_grad)
    return {name.removesuffix(".default").rpartition(".")[2] for name in trained}


ADAPTERS = {"dora": {"lora_A", "lora_B", "lora_magnitude_vector"}, "adalora": {"lora_A", "lora_B", "lora_E"}}
COUNTS = {
    "dora": R * PER_RANK + sum(n for n, _ in SIZES),
    "adalora": 6 * (PER_RANK + len(SIZES)),
    "lora_ga_ranks": PER_RANK,  # two triplets hold 90 % of each layer's gradient
}


@pytest.mark.parametrize("name", CONTESTANTS)
def test_what_is_trained_is_the_methods_own(trained, name):
    learner, before, _ = trained[name]
    whole = CONTESTANTS[name].adapter is None
    assert kinds(learner) == ({"weight", "bias"} if whole else ADAPTERS.get(name, {"lora_A", "lora_B"}))
    assert learner.trainable == (sum(n * m + n for n, m in SIZES) if whole else COUNTS.get(name, R * PER_RANK))
    for key, parameter in learner.model.named_parameters():
        moved = not torch.equal(parameter, before[key])
        assert moved == parameter.requires_grad, f"{key} {'moved' if moved else 'stayed'}"


def test_all_start_at_the_pretrained_function_and_none_goes_anothers_way(trained):
    firsts = {name: losses[0] for name, (_, _, losses) in trained.items()}
    assert firsts == pytest.approx(dict.fromkeys(firsts, firsts["full"]), rel=1e-4)
    lasts = [losses[-1] for _, _, losses in trained.values()]
    assert len({round(loss, 5) for loss in lasts}) == len(CONTESTANTS)
    for name, (learner, _, losses) in trained.items():
        again = learner.task.loss(learner.model, learner.task.batch(learner.task.order(0, 1)[0]))
        assert again < 0.95 * losses[0], f"{name} learnt nothing"


def layers(learner):
    return list(learners.lora_layers(learner.adapted).values())


def test_lora_plus_has_two_rates(trained):
    learner = trained["lora_plus"][0]
    groups = learner.optimizers[0].param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    for layer in layers(learner):
        assert rates[id(layer.lora_A["default"])] == 0.01
        assert rates[id(layer.lora_B["default"])] == 0.01 * 16
    assert learner.notes()["rates"] == {"lora_A": 0.01, "lora_B": 0.01 * 16}
    assert len(trained["lora"][0].optimizers[0].param_groups) == 1


def test_galore_steps_in_a_subspace_and_keeps_less(task, trained):
    galore, full = trained["galore"][0], trained["full"][0]
    assert type(galore.optimizers[0]) is fastlora.optim.GaLoreAdamW
    assert galore.trainable == full.trainable
    assert galore.optimizer_state < 0.2 * full.optimizer_state
    learner = Learner(task, CONTESTANTS["galore"], 0.01, seed=0, steps=STEPS)
    weight = dict(learner.model.named_parameters())["2.weight"]
    before = weight.detach().clone()
    learner.step(task.shares(task.order(0, 1)[0]))
    assert torch.linalg.matrix_rank(weight.detach() - before, rtol=1e-4) == R


def test_costs_are_measured_in_turn(task, monkeypatch):
    turns = []
    real = Learner.step

    def step(learner, batch):
        turns.append(learner.entry.title)
        return real(learner, batch)

    monkeypatch.setattr(Learner, "step", step)
    found = costs.measure(task, ["full", "lora"], rounds=2)["contestants"]
    full, lora = "full fine-tuning", "LoRA"
    rounds = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    assert len(rounds) == 3 + 2 + 1  # untimed, timed, under the profiler
    assert all(sorted(names) == [lora, full] for names in rounds)
    assert [lora, full] in rounds and [full, lora] in rounds
    assert all(cost["step_seconds"] > 0 for cost in found.values())
    weights = 4 * sum(n * m + n for n, m in SIZES)
    assert found["full"]["peak_bytes"] > 4 * weights  # weights, gradients, two moments
    assert weights < found["lora"]["peak_bytes"] < 2 * weights


def test_a_task_may_have_a_head_of_its_own_that_adamw_trains(task, monkeypatch):
    monkeypatch.setattr(type(task), "adapted", lambda self, model: model[:4])
    monkeypatch.setattr(type(task), "head", lambda self, model: list(model[4].parameters()))
    monkeypatch.setattr(task, "settings", replace(task.settings, optimizer="sgd", head_lr=0.02))
    for name in ("full", "lora"):
        learner = Learner(task, CONTESTANTS[name], 0.01, seed=0, steps=STEPS)
        sgd, adamw = learner.optimizers
        assert (type(sgd), type(adamw)) == (torch.optim.SGD, torch.optim.AdamW)
        assert adamw.param_groups[0]["initial_lr"] == 0.02
        held = [p for optimizer in (sgd, adamw) for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in learner.model.parameters() if p.requires_grad}
