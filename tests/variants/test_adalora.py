"""`RankAllocator`: masks and averages against the paper's equations in float64, and everything around them."""

from __future__ import annotations

import copy
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adalora_problem import NAMES, TARGET, Paper, R, loss_of, optimizer_of, patched, trained, triplets
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.layers.schedule import RankSchedule
from fastlora.ops.importance import aten as importance_aten
from fastlora.variants import RankAllocator

FP64 = torch.float64
STEPS = 30
SETTINGS: dict[str, Any] = {"target_r": TARGET, "total_steps": STEPS, "t_init": 4, "t_final": 8}


def train(model: Any, optimizer: torch.optim.Optimizer, allocator: RankAllocator, steps=STEPS, first=0, gamma=0.1):
    """Yields each step's number, when the gradients are still there."""
    for step in range(first, steps):
        loss_of(model, step, gamma).backward()
        optimizer.step()
        if not allocator._hooks:
            allocator.step()
        yield step
        optimizer.zero_grad()


def run(*args, **kwargs) -> None:
    for _ in train(*args, **kwargs):
        pass


def with_gradients(model: Any, gradients: dict[str, dict[str, Any]]) -> None:
    """Sets the factors' gradients by layer and key; a number fills one."""
    for name, factors in triplets(model).items():
        for key, factor in factors.items():
            value = gradients.get(name, {}).get(key)
            factor.grad = None if value is None else torch.zeros_like(factor) + value


def lambdas(model: Any) -> dict[str, list[float]]:
    return {name: factors["e"].flatten().tolist() for name, factors in triplets(model).items()}


# Against the paper.
def test_the_budget_is_continuous():
    schedule = RankSchedule(2, 100, 10, 30)
    budgets = [schedule.budget(t, 120, 60) for t in range(101)]
    assert budgets[:11] == [120] * 11 and budgets[70:] == [60] * 31
    assert budgets[40] == 67  # halfway: 60 + 60/8, rounded down
    assert all(0 <= a - b <= 60 * 3 / 60 + 1 for a, b in itertools.pairwise(budgets))  # the slope is at most 3Δb/ΔT

    def printed(t):  # the paper's equation 12
        return 60 + 60 * (1 - (t - 10 - 30) / (100 - 10 - 30)) ** 3

    assert printed(10) == 60 + 60 * 1.5**3 and printed(70) == 60 + 60 * 0.5**3  # 262.5 of 120, then 67.5


@pytest.mark.parametrize("delta_t", [1, 3])
@pytest.mark.parametrize("way", ["step", "follow"])
def test_a_training_run_is_the_paper_s_step_by_step(way, delta_t):
    model = patched(FP64)
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, **SETTINGS, delta_t=delta_t)
    paper = Paper(allocator.schedule, dict.fromkeys(NAMES, R))
    if way == "follow":
        allocator.follow(optimizer)

    def see() -> None:
        factors = triplets(model)
        paper.see(factors, {n: {k: p.grad for k, p in fs.items() if p.grad is not None} for n, fs in factors.items()})

    if way == "follow":
        optimizer.register_step_pre_hook(lambda *_: see())
    else:
        optimizer.register_step_post_hook(lambda *_: see())
    returned, before = 0, allocator.rank_pattern
    for step in train(model, optimizer, allocator):
        kept, now = paper.keep(), allocator.rank_pattern
        assert kept is None or kept == now
        if kept is not None:
            assert sum(allocator.ranks.values()) == paper.budget(step + 1) == allocator.budget(step + 1)
            assert {n: [e != 0 for e in values] for n, values in lambdas(model).items()} == kept
        if step + 1 < allocator.schedule.last:
            flat = torch.cat(list(allocator.scores.values()))
            torch.testing.assert_close(flat, torch.tensor([s for s, _, _ in paper.scores]).double())
        returned += sum(b and not a for n in NAMES for a, b in zip(before[n], now[n], strict=True))
        before = now
    assert allocator.is_final and sum(allocator.ranks.values()) == TARGET * len(NAMES)
    assert returned > 0  # a triplet that was masked came back


def test_p_and_q_of_masked_triplets_go_on_learning():
    model = patched()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, TARGET, STEPS, t_final=STEPS - 5)
    run(model, optimizer, allocator, steps=6)
    masked = [(name, i) for name, kept in allocator.rank_pattern.items() for i, keep in enumerate(kept) if not keep]
    before = {name: {k: p.detach().clone() for k, p in factors.items()} for name, factors in triplets(model).items()}
    assert len(masked) == (R - TARGET) * len(NAMES)
    for _ in train(model, optimizer, allocator, first=6):
        assert all(lambdas(model)[name][i] == 0 for name, i in masked)
    after = triplets(model)
    assert all(not torch.equal(before[n]["P"][:, i], after[n]["P"][:, i]) for n, i in masked)
    assert all(not torch.equal(before[n]["Q"][i], after[n]["Q"][i]) for n, i in masked)


# Which are kept.
def test_equal_scores_keep_the_earlier_ones_and_exactly_the_budget():
    model = patched()
    allocator = RankAllocator(model, target_r=1, total_steps=1)
    with_gradients(model, {key: {"e": 0.0, "P": 0.0, "Q": 0.0} for key in NAMES})
    allocator.step()  # every score is 0
    assert allocator.rank_pattern == {NAMES[0]: [True] * 3 + [False], NAMES[1]: [False] * R, NAMES[2]: [False] * R}
    assert allocator.ranks == {NAMES[0]: 3, NAMES[1]: 0, NAMES[2]: 0}


def test_the_best_of_all_layers():
    model = patched()
    allocator = RankAllocator(model, target_r=1, total_steps=1)
    for factors in triplets(model).values():
        for factor in factors.values():
            factor.data.fill_(1.0)
    best = {NAMES[0]: torch.tensor([[0.0], [3], [0], [0]]), NAMES[2]: torch.tensor([[2.0], [0], [0], [1]])}
    with_gradients(model, {name: {"e": best.get(name, 0.0)} for name in NAMES})
    allocator.step()
    assert {name: [i for i, keep in enumerate(kept) if keep] for name, kept in allocator.rank_pattern.items()} == {
        NAMES[0]: [1],
        NAMES[1]: [],
        NAMES[2]: [0, 3],
    }


def test_all_are_kept_where_the_target_is_the_initial_rank():
    """PEFT asks kthvalue for k = 0 there, and stops."""
    model = patched()
    allocator = RankAllocator(model, target_r=R, total_steps=5)
    run(model, optimizer_of(model), allocator, steps=5)
    assert allocator.is_final and set(allocator.ranks.values()) == {R}
    assert all(e != 0 for values in lambdas(model).values() for e in values)


def test_layers_of_several_ranks():
    model = patched(rank_pattern={"layers.1": 7})
    allocator = RankAllocator(model, target_r=2, total_steps=8)
    assert allocator.initial_budget == 15 and allocator.target_budget == 6
    run(model, optimizer_of(model), allocator, steps=8)
    assert sum(allocator.ranks.values()) == 6
    assert [len(kept) for kept in allocator.rank_pattern.values()] == [4, 7, 4]


# Gradients.
def test_a_layer_without_a_gradient_counts_as_one_with_zeros():
    outcomes = []
    for missing in (None, 0.0):
        model = patched(seed=1)
        allocator = RankAllocator(model, TARGET, STEPS)
        for step in range(3):
            full: dict[str, dict[str, Any]] = {name: {"e": step + 1.0, "P": 0.5, "Q": step - 1.5} for name in NAMES}
            full[NAMES[1]] = dict.fromkeys(("e", "P", "Q"), missing)
            full[NAMES[2]] = {**full[NAMES[2]], "P": missing}
            with_gradients(model, full)
            allocator.step()
        outcomes.append((allocator.state_dict(), lambdas(model)))
    assert _same(*outcomes)


def _same(one: Any, other: Any) -> bool:
    """The same structure with the same bits."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def test_no_gradient_at_all_says_what_is_in_the_wrong_order():
    model = patched()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, **SETTINGS)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"has a gradient, want this after backward\(\) and before zero_grad\(\)"):
        allocator.step()
    assert allocator.steps == 0


def test_one_bad_step_does_not_stay():
    """An overflow in one step, as a GradScaler meets them, counts as no gradient there."""
    model, clean = patched(), patched()
    allocators = [RankAllocator(each, **SETTINGS) for each in (model, clean)]
    for bad, good in ((float("nan"), 0.0), (0.3, 0.3)):
        for each, allocator, value in zip((model, clean), allocators, (bad, good), strict=True):
            with_gradients(each, {key: {"e": 0.5, "P": value, "Q": value} for key in NAMES})
            allocator.step()
    assert _same(*(allocator.state_dict() for allocator in allocators))
    assert all(scores.isfinite().all() for scores in allocators[0].scores.values())


class _ReadBack(TorchDispatchMode):
    """Counts what would make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(
            word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_but_the_final_pattern():
    model = patched()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, **SETTINGS)
    read = _ReadBack()
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        with read:
            allocator.step()
        optimizer.zero_grad()
        assert not read.seen
    assert allocator.is_final
    with read:
        torch.ones(1).item()
    assert read.seen  # it does see such a call


# Following an optimiser.
def test_follow_sees_the_weights_before_the_step():
    model = patched()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, **SETTINGS).follow(optimizer)
    assert "following an optimiser" in repr(allocator)
    loss_of(model, 0, gamma=0.0).backward()
    optimizer.step()
    assert all(not scores.any() for scores in allocator.scores.values())  # Λ = 0: so are the gradients of P and Q
    assert any(e != 0 for values in lambdas(model).values() for e in values)
    assert allocator.steps == 1


def test_never_both_ways_at_once():
    model = patched()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, **SETTINGS).follow(optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="an optimiser is followed, whose steps are counted already"):
        allocator.step()
    with pytest.raises(ValueError, match="an optimiser is followed already, want release"):
        allocator.follow(optimizer)
    allocator.release()
    optimizer.step()
    assert allocator.steps == 0
    allocator.step()
    assert allocator.steps == 1


def test_follow_wants_the_optimiser_of_all_layers():
    model = patched()
    allocator = RankAllocator(model, **SETTINGS)
    half = torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "layers.2" not in n])
    with pytest.raises(ValueError, match=r"this SGD does not have the lora_E of 'layers\.2' and 0 other"):
        allocator.follow(half)
    with pytest.raises(ValueError, match="has none of the adapters' parameters"):
        allocator.follow(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match=r"want a torch\.optim\.Optimizer"):
        allocator.follow(model)


def test_follow_with_a_closure_and_positional_or_not():
    outcomes = []
    for how in ("plain", "positional", "keyword"):
        model = patched()
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        allocator = RankAllocator(model, **SETTINGS).follow(optimizer)
        for step in range(6):

            def closure(step=step, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if how == "plain":
                closure()
                optimizer.step()
            elif how == "positional":
                optimizer.step(closure)
            else:
                optimizer.step(closure=closure)
        outcomes.append(allocator.state_dict())
    assert _same(outcomes[0], outcomes[1]) and _same(outcomes[0], outcomes[2])


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_steps_that_a_grad_scaler_skips_do_not_count(unscaled_before):
    """In an optimiser that skips them itself (fused), as in one that is not called at all."""
    outcomes = []
    for fused in (False, True):
        model = patched()
        optimizer = torch.optim.AdamW(trained(model), lr=0.01, fused=fused)
        allocator = RankAllocator(model, **SETTINGS).follow(optimizer)
        scaler, counted = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
        for step in range(10):
            scaler.scale(loss_of(model, step)).backward()
            if step in (0, 3, 4, 6):
                model.layers[0].lora_B["default"].grad.fill_(float("inf"))
            if unscaled_before:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            counted.append(allocator.steps)
        assert counted == [0, 1, 2, 2, 2, 3, 3, 4, 5, 6]
        outcomes.append((torch.cat(list(allocator.scores.values())), allocator.rank_pattern))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-4, atol=0.0)
    assert outcomes[0][1] == outcomes[1][1]


class Repeated(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return {name: value[index % 2] for name, value in tiny_batch("llama").items()}


def documented_trainer() -> Any:
    """docs/adalora.md's."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "details" / "adalora.md").read_text(encoding="utf-8")
    code = re.search(r"^class AdaLoraTrainer.*?(?=^\S)", page, re.M | re.S)
    assert code is not None
    names = {"transformers": transformers, "orthogonality_penalty": fastlora.variants.orthogonality_penalty}
    exec(code[0], names)
    return names["AdaLoraTrainer"]


def trainer_arguments(directory: Path, **settings: Any) -> transformers.TrainingArguments:
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **settings}
    return transformers.TrainingArguments(output_dir=str(directory), **settings)


@pytest.mark.parametrize("by_the_model", [True, False])
def test_the_penalty_in_transformers_trainer_is_that_of_a_step(by_the_model, tmp_path):
    """However many batches a step is made of, and whoever divides by their number."""
    gradients = []
    for accumulated, of_a_batch in ((1, 4), (2, 2), (4, 1)):
        model: Any = tiny_model("llama")
        torch.manual_seed(0)
        fastlora.patch(model, r=R, use_adalora=True)
        seen: dict[str, Tensor] = {}
        optimizer = torch.optim.SGD(trained(model), lr=0.0)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer.register_step_pre_hook(
            lambda *_, seen=seen, names=names, model=model: seen.update(
                {names[id(p)]: p.grad.clone() for p in trained(model)}  # type: ignore[union-attr]
            )
        )
        settings = {"max_steps": 1, "per_device_train_batch_size": of_a_batch, "max_grad_norm": 0}
        arguments = trainer_arguments(tmp_path, **settings, gradient_accumulation_steps=accumulated)
        trainer = documented_trainer()(
            model, arguments, train_dataset=Repeated(), eval_dataset=Repeated(), optimizers=(optimizer, None)
        )
        trainer.model_accepts_loss_kwargs = by_the_model
        with torch.no_grad():
            task_loss = model(**tiny_batch("llama")).loss
        assert trainer.evaluate()["eval_loss"] == pytest.approx(task_loss.item(), rel=1e-5)  # the task's alone
        trainer.train()
        gradients.append(seen)
    model.zero_grad()
    fastlora.variants.orthogonality_penalty(model).backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_A.default", "lora_B.default")):  # Λ = 0: the loss itself has none
            for seen in gradients:
                torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_follow_in_transformers_trainer(tmp_path):
    model: Any = tiny_model("llama")
    fastlora.patch(model, r=R, use_adalora=True)
    layers = len(triplets(model))
    allocator = RankAllocator(model, TARGET, total_steps=6, t_init=1, t_final=2)
    optimizer = optimizer_of(model)
    allocator.follow(optimizer)
    arguments = trainer_arguments(tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    documented_trainer()(model, arguments, train_dataset=Repeated(), optimizers=(optimizer, None)).train()
    assert allocator.steps == 6 and allocator.is_final
    assert sum(allocator.ranks.values()) == TARGET * layers
    assert {n: [e != 0 for e in values] for n, values in lambdas(model).items()} == allocator.rank_pattern


# Resuming, moving.
@pytest.mark.parametrize("way", ["step", "follow"])
@pytest.mark.parametrize("at", [2, 11, 25])
def test_a_run_that_is_resumed_goes_on_to_the_same_bits(at, way):
    def begin() -> tuple[Any, torch.optim.Optimizer, RankAllocator]:
        model = patched()
        optimizer = optimizer_of(model)
        allocator = RankAllocator(model, **SETTINGS, delta_t=2)
        return model, optimizer, allocator.follow(optimizer) if way == "follow" else allocator

    whole, first, second = begin(), begin(), begin()
    run(*whole)
    run(*first, steps=at)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    buffer.seek(0)
    for part, state in zip(second, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert second[2].steps == at and second[2].rank_pattern == first[2].rank_pattern
    assert second[2].is_final == (at == 25)
    run(*second, first=at)
    assert _same(*(dict(each[0].named_parameters()) for each in (whole, second)))
    assert _same(*(each[2].state_dict() for each in (whole, second)))
    assert _same(*([layer.allocation for layer in each[0].layers] for each in (whole, second)))


def test_another_model_s_state_is_refused():
    allocator = RankAllocator(patched(), **SETTINGS)
    others = [RankAllocator(patched(r=3), **SETTINGS), RankAllocator(patched(target_modules=["layers.0"]), 1, 9)]
    others[0].schedule = RankSchedule(1, 5, 0, 1)
    for other in others:
        model = other._model
        loss_of(model, 0).backward()
        other.step()
    loss_of(allocator._model, 1).backward()
    allocator.step()
    before = allocator.state_dict()
    for change in (  # of other sizes; half of one
        lambda importance: importance[NAMES[2]].update(lora_B=torch.ones(2, 7, R)),
        lambda importance: importance[NAMES[2]].update(lora_E=torch.ones(2, R)),
        lambda importance: importance[NAMES[2]].pop("lora_A"),
        lambda importance: importance.pop(NAMES[2]),
    ):
        changed = copy.deepcopy(before)
        changed["importance"][NAMES[0]]["lora_A"].zero_()
        change(changed["importance"])
        with pytest.raises(ValueError, match=r"or their sizes, are not this model's \((layers\.2|some are missing)\)"):
            allocator.load_state_dict(changed)
    with pytest.raises(ValueError, match=r"are not this model's \(layers.0"):
        allocator.load_state_dict(others[0].state_dict())
    with pytest.raises(ValueError, match=r"are not this model's \(some are missing\)"):
        allocator.load_state_dict(others[1].state_dict())
    assert _same(before, allocator.state_dict())


def test_a_model_that_is_cast_on_the_way():
    """As one that is moved: Ī and Ū go where the factors are."""
    model = patched()
    allocator = RankAllocator(model, **SETTINGS)
    run(model, optimizer_of(model), allocator, steps=8)
    before = allocator.state_dict()
    model.double()
    run(model, optimizer_of(model), allocator, steps=12, first=8)
    assert allocator._parts[0].sensitivity.dtype == FP64 and before["steps"] == 8
    assert sum(allocator.ranks.values()) == allocator.budget(12)


def test_layers_of_two_dtypes_are_ranked_together():
    model = patched(FP64)
    model.layers[1].float()
    allocator = RankAllocator(model, target_r=1, total_steps=1)
    ones = {name: {"e": float(i + 1), "P": 0.0, "Q": 0.0} for i, name in enumerate(NAMES)}
    for factors in triplets(model).values():
        factors["e"].data.fill_(1.0)
    with_gradients(model, ones)
    allocator.step()
    assert len(allocator._parts) == 2
    assert allocator.ranks == {NAMES[0]: 0, NAMES[1]: 0, NAMES[2]: 3}
    assert list(allocator.scores) == NAMES
    assert RankAllocator.load_state_dict(allocator, allocator.state_dict()) is None
    assert allocator.ranks == {NAMES[0]: 0, NAMES[1]: 0, NAMES[2]: 3}


@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copy_of_an_allocator_that_follows_follows_nothing(way):
    model = patched()
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, **SETTINGS).follow(optimizer)
    run(model, optimizer, allocator, steps=5)
    if way == "copied":
        model2, optimizer2, allocator2 = copy.deepcopy((model, optimizer, allocator))
    else:
        buffer = io.BytesIO()
        torch.save((model, optimizer, allocator), buffer)
        buffer.seek(0)
        model2, optimizer2, allocator2 = torch.load(buffer, weights_only=False)
    assert "following" in repr(allocator) and "following" not in repr(allocator2)
    allocator2.follow(optimizer2)
    for each in ((model, optimizer, allocator), (model2, optimizer2, allocator2)):
        run(*each, first=5)
    assert allocator2.is_final and _same(dict(model.named_parameters()), dict(model2.named_parameters()))
    allocator.release()
    assert "following" in repr(allocator2)


# What is refused, and what is said.
def test_arguments_are_checked():
    model = patched()
    for wrong, message in (
        ({"target_r": 0}, "target_r: got 0, want an integer of at least 1"),
        ({"target_r": 5}, "target_r: got 5, want at most 4, the average rank"),
        ({"total_steps": 2.5}, "total_steps: got 2.5"),
        ({"t_init": -1}, "t_init: got -1"),
        ({"t_init": 22}, "t_init: got 22 and t_final 8 of 30 steps, want some steps between them"),
        ({"delta_t": 0}, "delta_t: got 0"),
        ({"beta1": 1.0}, "beta1: got 1.0, want a number between 0 and 1"),
        ({"beta2": 0}, "beta2: got 0"),
        ({"adapter_name": "other"}, r"adapter_name: got 'other', and its AdaLoRA adapters are \['default'\]"),
    ):
        with pytest.raises(ValueError, match=f"RankAllocator: {message}"):
            RankAllocator(model, **{**SETTINGS, **wrong})
    plain = patched(use_adalora=False)
    with pytest.raises(ValueError, match=r"has no AdaLoRA adapters; want one after fastlora.patch\(model, use_adalora"):
        RankAllocator(plain, **SETTINGS)


def test_repr_says_where_it_stands():
    model = patched()
    allocator = RankAllocator(model, **SETTINGS)
    assert repr(allocator) == "RankAllocator(3 layers, step 0 of 30, 12 of 12 ranks, 6 from step 22 on)"
    run(model, optimizer_of(model), allocator, steps=10)
    assert repr(allocator) == "RankAllocator(3 layers, step 10 of 30, 7 of 12 ranks, 6 from step 22 on)"


def test_sharded_parameters_are_refused(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard

    model = patched()
    fully_shard(model, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    for call in (lambda: RankAllocator(model, **SETTINGS), lambda: fastlora.variants.orthogonality_penalty(model)):
        with pytest.raises(ValueError, match=r"got sharded parameters .*, want .* split by rows"):
            call()
    model = patched()
    fully_shard(model)
    with pytest.raises(ValueError, match="shrink_to_ranks: model: got sharded parameters"):
        fastlora.variants.shrink_to_ranks(model, {})
    wrapped = FullyShardedDataParallel(patched(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="got FullyShardedDataParallel, want one"):
        RankAllocator(wrapped, **SETTINGS)


def test_parameters_of_zero_3_are_refused():
    model = patched()
    model.layers[1].lora_B["default"].ds_id = 7
    with pytest.raises(ValueError, match=r"got parameters partitioned by ZeRO-3 \('layers.1'\)"):
        RankAllocator(model, **SETTINGS)


def test_inside_distributed_data_parallel_names_are_the_model_s(one_process):
    model = patched()
    wrapped = nn.parallel.DistributedDataParallel(model)
    allocator = RankAllocator(wrapped, **SETTINGS)
    assert list(allocator.ranks) == NAMES
    alone = patched()
    other = RankAllocator(alone, **SETTINGS)
    run(wrapped, optimizer_of(model), allocator)
    run(alone, optimizer_of(alone), other)
    assert allocator.rank_pattern == other.rank_pattern
    assert _same(dict(model.named_parameters()), dict(alone.named_parameters()))


def test_parts_of_any_size_give_the_same(monkeypatch):
    outcomes = []
    for chunk in (1, 100, 1 << 16):
        monkeypatch.setattr(importance_aten, "CHUNK", chunk)
        model = patched(rank_pattern={"layers.1": 7})
        allocator = RankAllocator(model, **SETTINGS)
        run(model, optimizer_of(model), allocator)
        outcomes.append(allocator.rank_pattern)
    assert outcomes[0] == outcomes[1] == outcomes[2]
