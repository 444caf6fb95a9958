"""AdaLoRA's ranks, in PEFT's models above all: whatever an allocator has masked or cut, a file computes what the model
does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adalora_problem import NAMES, TARGET, R, batch, loss_of, optimizer_of, patched, plain, triplets

import fastlora
from fastlora.integrations.peft import ranks as peft_ranks
from fastlora.variants import RankAllocator, shrink_to_ranks

X = batch(99)[0]
STEPS, LAST = 8, 6


def peft_model(run_fused: bool) -> Any:
    config = peft.AdaLoraConfig(init_r=R, target_r=TARGET, total_step=STEPS, target_modules=NAMES)
    model = peft.get_peft_model(plain(), config)
    if run_fused:
        fastlora.patch(model)
    return model


@pytest.fixture(params=[False, True], ids=["unpatched", "patched"])
def model(request) -> Any:
    return peft_model(request.param)


@pytest.fixture(params=["plain", "unpatched", "patched"])
def any_model(request) -> Any:
    return patched() if request.param == "plain" else peft_model(request.param == "patched")


def train(model: Any, optimizer: torch.optim.Optimizer, allocator: RankAllocator | None, steps: int = STEPS) -> None:
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        if allocator is not None:
            allocator.step()
        optimizer.zero_grad()


def begin(model: Any, target_r: int = TARGET, steps: int = STEPS) -> tuple[torch.optim.Optimizer, RankAllocator]:
    return optimizer_of(model), RankAllocator(model, target_r, steps, t_final=steps - LAST)


def reloaded(model: Any, directory: Path, save: Any = None) -> Any:
    """By PEFT, from what PEFT's own `save_pretrained`, or `save`, has written."""
    (model.save_pretrained if save is None else lambda d: save(model, d))(directory)
    return peft.PeftModel.from_pretrained(plain(), directory)


def assert_the_files_are_the_model(model: Any, directory: Path) -> None:
    want, config = model(X), getattr(model, "peft_config", {}).get("default")
    for name, save in (("peft", None), ("fastlora", fastlora.save_adapter)):
        if save is None and config is None:
            continue  # a plain model
        pattern = getattr(config, "rank_pattern", None)
        torch.testing.assert_close(reloaded(model, directory / name, save)(X), want, rtol=1e-5, atol=1e-6)
        if save is not None:
            assert getattr(config, "rank_pattern", None) is pattern
        here = plain()
        fastlora.load_adapter(here, directory / name)
        torch.testing.assert_close(here(X), want, rtol=1e-4, atol=1e-5)  # PEFT's 1e-5 beside the rank


def pattern_of(model: Any) -> dict[str, list[bool]]:
    """PEFT's, by layer."""
    pattern = model.peft_config["default"].rank_pattern or {}
    return {key.removesuffix(".default").removesuffix(".lora_E"): kept for key, kept in pattern.items()}


def by_layer(allocator: RankAllocator) -> dict[str, list[bool]]:
    return {name.removeprefix("base_model.model."): kept for name, kept in allocator.rank_pattern.items()}


def ranks_of(model: Any) -> dict[str, int]:
    return {name.removeprefix("base_model.model."): len(factors["e"]) for name, factors in triplets(model).items()}


def test_masked_ranks_that_are_trained_on_are_saved(any_model, tmp_path):
    model = any_model
    optimizer, allocator = begin(model)
    train(model, optimizer, allocator)
    assert_the_files_are_the_model(model, tmp_path / "masked")
    loaded = reloaded(model, tmp_path, fastlora.save_adapter)
    assert pattern_of(loaded) == by_layer(allocator) and sum(ranks_of(loaded).values()) == TARGET * len(NAMES)
    train(model, optimizer, None)  # without the allocator
    assert all(factors["e"].ne(0).all() for factors in triplets(model).values())
    assert_the_files_are_the_model(model, tmp_path / "trained")
    with torch.no_grad():
        for factors in triplets(model).values():
            factors["e"][0] = 0.0
    loaded = reloaded(model, tmp_path, fastlora.save_adapter)
    assert pattern_of(loaded) == {name: [kept[0], True, True, True] for name, kept in by_layer(allocator).items()}


def test_a_state_from_before_the_end_takes_the_masks_back(any_model, tmp_path):
    model = any_model
    optimizer, allocator = begin(model)
    train(model, optimizer, allocator, 3)
    parts = (model, optimizer, allocator)
    states = copy.deepcopy([part.state_dict() for part in parts])
    train(model, optimizer, allocator)
    assert allocator.is_final
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    assert_the_files_are_the_model(model, tmp_path)
    assert ranks_of(reloaded(model, tmp_path, fastlora.save_adapter)) == dict.fromkeys(NAMES, R)
    train(model, optimizer, allocator)
    assert_the_files_are_the_model(model, tmp_path / "again")
    assert pattern_of(reloaded(model, tmp_path, fastlora.save_adapter)) == by_layer(allocator)


def test_a_second_allocator_begins_with_all_ranks_that_are_there(any_model, tmp_path):
    model = any_model
    train(model, *begin(model))
    optimizer, second = begin(model, steps=20)
    train(model, optimizer, second, 3)
    assert not second.is_final
    assert_the_files_are_the_model(model, tmp_path)
    assert ranks_of(reloaded(model, tmp_path, fastlora.save_adapter)) == dict.fromkeys(NAMES, R)


def test_what_peft_s_allocator_has_masked_is_whole_for_ours(model, tmp_path):
    optimizer = optimizer_of(model)
    for step in range(1, STEPS + 1):
        loss_of(model, step).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert_the_files_are_the_model(model, tmp_path / "theirs")
    assert sum(ranks_of(reloaded(model, tmp_path, fastlora.save_adapter)).values()) < R * len(NAMES)
    train(model, optimizer, None, 2)  # what `save_pretrained` then leaves out is PEFT's business
    want = model(X)
    torch.testing.assert_close(reloaded(model, tmp_path, fastlora.save_adapter)(X), want, rtol=1e-5, atol=1e-6)
    optimizer, allocator = begin(model)
    assert model.peft_config["default"].rank_pattern is None
    train(model, optimizer, allocator, 2)
    assert_the_files_are_the_model(model, tmp_path / "ours")


def test_a_second_cut_is_in_terms_of_the_ranks_that_all_began_with(model, tmp_path):
    optimizer, first = begin(model, target_r=3)
    train(model, optimizer, first)
    shrink_to_ranks(model, first, optimizer)
    assert pattern_of(model) == by_layer(first)
    second = RankAllocator(model, 1, STEPS, t_final=STEPS - LAST)
    train(model, optimizer, second)
    assert_the_files_are_the_model(model, tmp_path / "masked")
    assert pattern_of(model) == by_layer(first)
    shrink_to_ranks(model, second, optimizer)
    assert_the_files_are_the_model(model, tmp_path / "cut")
    left = {}
    for name, kept in by_layer(first).items():
        places, now = [i for i, keep in enumerate(kept) if keep], by_layer(second)[name]
        left[name] = [i in [place for place, keep in zip(places, now, strict=True) if keep] for i in range(R)]
    assert pattern_of(model) == left
    assert ranks_of(model) == {name: sum(kept) for name, kept in left.items()}


def test_a_pruned_file_is_trained_and_dealt_out_again(model, tmp_path):
    optimizer, first = begin(model, target_r=3)
    train(model, optimizer, first)
    fastlora.save_adapter(model, tmp_path / "first")
    again: Any = peft.PeftModel.from_pretrained(plain(), tmp_path / "first", is_trainable=True)
    assert ranks_of(again) == {name: sum(kept) for name, kept in by_layer(first).items()}
    optimizer, second = begin(again, target_r=1)
    train(again, optimizer, second, 4)
    assert_the_files_are_the_model(again, tmp_path / "half")
    train(again, optimizer, second, 4)
    assert_the_files_are_the_model(again, tmp_path / "masked")
    shrink_to_ranks(again, second, optimizer)
    assert_the_files_are_the_model(again, tmp_path / "cut")


def test_cutting_by_a_dict_without_an_allocator(model, tmp_path):
    optimizer, allocator = begin(model, steps=20)
    train(model, optimizer, allocator, STEPS)
    name = f"base_model.model.{NAMES[0]}"
    kept = {NAMES[0]: [True, False, True, True], NAMES[2]: [False, True, False, False]}
    with torch.no_grad():
        for short, keeps in kept.items():
            triplets(model)[f"base_model.model.{short}"]["e"].mul_(torch.tensor(keeps).unsqueeze(1))
    assert shrink_to_ranks(model, {name: kept[NAMES[0]]}, optimizer)[name] == 3
    assert_the_files_are_the_model(model, tmp_path / "one")
    shrink_to_ranks(model, {f"base_model.model.{NAMES[2]}": kept[NAMES[2]]}, optimizer)
    assert_the_files_are_the_model(model, tmp_path / "two")
    assert pattern_of(model) == {**kept, NAMES[1]: [True] * R}
    triplets(model)[name]["e"].data[1] = 0.0
    shrink_to_ranks(model, {name: [True, False, True]}, optimizer)
    assert pattern_of(model)[NAMES[0]] == [True, False, False, True]
    assert_the_files_are_the_model(model, tmp_path / "three")


def test_other_adapters_and_other_models_are_left_alone():
    base = plain()
    peft_ranks.mask(base, "default", {})
    with peft_ranks.as_saved(base, "default"):
        pass
    lora: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=NAMES, rank_pattern={NAMES[0]: 2}))
    peft_ranks.mask(lora, "default", {})
    peft_ranks.cut(lora, "default", {})
    with peft_ranks.as_saved(lora, "default"):
        assert lora.peft_config["default"].rank_pattern == {NAMES[0]: 2}
