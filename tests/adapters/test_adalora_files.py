"""AdaLoRA's adapters on disk: ours read by PEFT, PEFT's read here, before and after ranks are dealt out."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from adalora_problem import NAMES, TARGET, Net, R, batch, loss_of, optimizer_of, patched, plain, triplets
from torch import nn

import fastlora
from fastlora import load_adapter, save_adapter
from fastlora.layers.schedule import RankSchedule
from fastlora.variants import RankAllocator, shrink_to_ranks

STEPS = 12
X = batch(0)[0]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def allocated(steps=STEPS, target_r=TARGET, **settings) -> tuple[Any, RankAllocator]:
    """A model after some steps of training, the last of which makes the pattern final."""
    model = patched(**settings)
    optimizer = optimizer_of(model)
    allocator = RankAllocator(model, target_r, steps, t_init=2, t_final=2, beta1=0.8)
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    return model, allocator


def from_peft(base, directory) -> Any:
    """PEFT's loader; a warning is a failure, but for what PEFT says of every pattern of AdaLoRA's, its own too: it
    takes the keys for LoRA's, which are modules' names."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match any targeted module")
        return exact(peft.PeftModel.from_pretrained(base, directory))


def exact(model: Any) -> Any:
    """PEFT divides alpha by the rank + 1e-5, 2.5e-6 of the low-rank term at rank 4: taken out, to compare the rest."""
    for layer in model.modules():
        for ranknum in getattr(layer, "ranknum", {}).values():
            assert ranknum.item() in (R, 0)  # that of a layer without ranks
            if ranknum.item() == R:
                ranknum.data -= 1e-5
    return model


def config_of(directory) -> dict[str, Any]:
    return json.loads((Path(directory) / "adapter_config.json").read_text())


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(directory) / "adapter_model.safetensors")


def edit_config(directory, **changes) -> None:
    path = Path(directory) / "adapter_config.json"
    path.write_text(json.dumps({**config_of(directory), **changes}))


def peft_model(**config: Any) -> Any:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "init_r": R,
        "target_r": TARGET,
        "tinit": 2,
        "tfinal": 2,
        "total_step": STEPS,
        "lora_alpha": 8,
    }
    settings |= {"target_modules": NAMES, "beta1": 0.8, **config}
    return peft.get_peft_model(plain(), peft.AdaLoraConfig(**settings))


def trained_by_peft(steps=STEPS, **config) -> Any:
    """With PEFT's own allocator."""
    model = peft_model(**config)
    optimizer = optimizer_of(model)
    for step in range(1, steps + 1):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def random_adapter(**settings) -> Any:
    model = patched(**settings)
    for factors in triplets(model).values():
        for factor in factors.values():
            nn.init.normal_(factor, std=0.5)
    return model


# PEFT reads what is saved here.
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1, "lora_alpha": 2.5}, {"use_rslora": True}], ids=str)
def test_peft_loads_ranks_that_were_not_dealt_out(settings, tmp_path):
    model = random_adapter(**settings).eval()
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert (config["peft_type"], config["init_r"], config["rank_pattern"]) == ("ADALORA", R, None)
    assert {key.rpartition(".")[2] for key in tensors_of(tmp_path)} == {"lora_A", "lora_B", "lora_E"}
    torch.testing.assert_close(from_peft(plain(), tmp_path)(X), model(X), **CLOSE)


@pytest.mark.parametrize("shrunk", [False, True])
def test_peft_loads_the_ranks_that_are_left(shrunk, tmp_path):
    model, allocator = allocated()
    want, ranks, pattern = model(X), allocator.ranks, allocator.rank_pattern
    if shrunk:
        shrink_to_ranks(model, allocator)
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    given = {"init_r": R, "target_r": TARGET, "tinit": 2, "tfinal": 2, "deltaT": 1, "beta1": 0.8, "beta2": 0.85}
    given |= {"total_step": STEPS, "lora_alpha": 8, "orth_reg_weight": 0.5}
    assert {key: config[key] for key in given} == given
    assert config["rank_pattern"] == {f"{name}.lora_E": kept for name, kept in pattern.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(tmp_path).items()}
    for name in NAMES:
        layer = model.get_submodule(name)
        assert shapes[f"base_model.model.{name}.lora_A"] == (ranks[name], layer.in_features)
        assert shapes[f"base_model.model.{name}.lora_B"] == (layer.out_features, ranks[name])
        assert shapes[f"base_model.model.{name}.lora_E"] == (ranks[name], 1)
    loaded = from_peft(plain(), tmp_path)
    assert {n: m.r["default"] for n, m in loaded.base_model.model.named_modules() if hasattr(m, "ranknum")} == ranks
    torch.testing.assert_close(loaded(X), want, **CLOSE)


def with_rank_0() -> tuple[Any, dict[str, int]]:
    model = random_adapter()
    allocator = RankAllocator(model, target_r=1, total_steps=1)
    for name, factors in triplets(model).items():
        for factor in factors.values():
            factor.grad = torch.full_like(factor, 0.0 if name == NAMES[1] else 1.0)
    allocator.step()
    assert allocator.ranks[NAMES[1]] == 0 and min(allocator.ranks[n] for n in (NAMES[0], NAMES[2])) > 0
    return model, allocator.ranks


@pytest.mark.parametrize("shrunk", [False, True])
def test_layers_of_rank_0(shrunk, tmp_path):
    model, ranks = with_rank_0()
    want = model(X)
    if shrunk:
        pattern = {name: [e != 0 for e in factors["e"].flatten().tolist()] for name, factors in triplets(model).items()}
        assert shrink_to_ranks(model, pattern)[NAMES[1]] == 0
        assert not model.get_submodule(NAMES[1]).lora_A  # it has lost its adapter
        torch.testing.assert_close(model(X), want, **CLOSE)
    save_adapter(model, tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(tmp_path).items()}
    assert shapes.get(f"base_model.model.{NAMES[1]}.lora_A") == (None if shrunk else (0, 10))
    torch.testing.assert_close(from_peft(plain(), tmp_path)(X), want, **CLOSE)
    again = plain()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), want, **CLOSE)
    assert {name: factors["e"].numel() for name, factors in triplets(again).items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert type(again.get_submodule(NAMES[1])) is nn.Linear
    full = random_adapter()  # into a model with all ranks: the others become zero
    load_adapter(full, tmp_path)
    torch.testing.assert_close(full(X), want, **CLOSE)
    assert {n: int((f["e"] != 0).sum()) for n, f in triplets(full).items()} == ranks
    save_adapter(full, tmp_path / "again")  # and stay out of its files
    torch.testing.assert_close(from_peft(plain(), tmp_path / "again")(X), want, **CLOSE)


def test_only_adaloras_cut_files_leave_layers_out(tmp_path):
    """A file without a pattern, or a layer with another kind of adapter, is a file of another model."""
    model, _ = with_rank_0()
    pattern = {name: [e != 0 for e in factors["e"].flatten().tolist()] for name, factors in triplets(model).items()}
    shrink_to_ranks(model, pattern)
    save_adapter(model, tmp_path)
    other = plain()
    fastlora.patch(other, r=2, target_modules=NAMES)
    with pytest.raises(ValueError, match=rf"exists already, also in {NAMES[1]}, for which there are no weights"):
        load_adapter(other, tmp_path)


def test_ranks_and_scales_that_the_format_has_one_of(tmp_path):
    """Layers may begin with other ranks and alphas: the largest rank and the usual alpha are the file's."""
    model = random_adapter(rank_pattern={NAMES[0]: 2}, alpha_pattern={NAMES[2]: -3.0})
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert (config["init_r"], config["lora_alpha"]) == (4, 16)  # of layers.0: 8/2
    assert config["rank_pattern"][f"{NAMES[0]}.lora_E"] == [True, True, False, False]
    torch.testing.assert_close(from_peft(plain(), tmp_path)(X), model(X), **CLOSE)
    again = plain()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), model(X), **CLOSE)


def test_alphas_that_are_not_positive(tmp_path):
    model = random_adapter(lora_alpha=-2.0)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["lora_alpha"] == R
    torch.testing.assert_close(from_peft(plain(), tmp_path)(X), model(X), **CLOSE)
    edit_config(tmp_path, lora_alpha=0)  # for PEFT a scale of one
    again = plain()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), model(X), **CLOSE)


# What PEFT saved.
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.2, "lora_alpha": 3}], ids=str)
def test_what_peft_saved_before_it_dealt_ranks_out_loads_here(config, tmp_path):
    model = peft_model(init_lora_weights=False, **config)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["rank_pattern"] is None
    here = plain()
    load_adapter(here, tmp_path)
    torch.testing.assert_close(here.eval()(X), exact(model).eval()(X), **CLOSE)
    layer: Any = here.layers[0]
    assert layer.use_adalora == {"default": True} and layer.lora_dropout["default"] == config.get("lora_dropout", 0.0)
    assert layer.allocation["default"].schedule == RankSchedule(TARGET, STEPS, 2, 2, beta1=0.8)
    allocator = RankAllocator(here, TARGET, STEPS)  # and can be trained further
    loss_of(here, 0).backward()
    allocator.step()


def test_what_peft_saved_after_it_dealt_ranks_out_loads_here(tmp_path):
    model = trained_by_peft()
    model.save_pretrained(tmp_path / "peft")
    ranks = {key: sum(kept) for key, kept in config_of(tmp_path / "peft")["rank_pattern"].items()}
    assert sum(ranks.values()) < R * len(NAMES)
    here = plain()
    load_adapter(here, tmp_path / "peft")
    torch.testing.assert_close(here(X), model(X), **CLOSE)
    assert {f"{n}.lora_E": f["e"].numel() for n, f in triplets(here).items()} == {n: r for n, r in ranks.items() if r}
    save_adapter(here, tmp_path / "ours")  # and back: what was there is kept
    kept = [{k: v for k, v in config_of(tmp_path / n).items() if "rank" in k or "t" in k[:1]} for n in ("peft", "ours")]
    differing = {key for key in kept[1] if kept[0][key] != kept[1][key]}
    assert differing <= {"task_type", "target_modules"}
    torch.testing.assert_close(from_peft(plain(), tmp_path / "ours")(X), model(X), **CLOSE)


def test_names_with_the_adapter_s_in_them(tmp_path):
    """As PEFT's configuration has them while it is in a model."""
    model, _ = allocated()
    save_adapter(model, tmp_path)
    pattern = config_of(tmp_path)["rank_pattern"]
    edit_config(tmp_path, rank_pattern={f"{key}.default": kept for key, kept in pattern.items()})
    here = plain()
    load_adapter(here, tmp_path)
    torch.testing.assert_close(here(X), model(X), **CLOSE)


# As plain LoRA.
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=str)
def test_as_plain_lora(settings, tmp_path):
    model, allocator = allocated(**settings)
    save_adapter(model, tmp_path, as_lora=True)
    config = config_of(tmp_path)
    assert config["peft_type"] == "LORA" and config["use_rslora"] == bool(settings)
    here = plain()
    load_adapter(here, tmp_path)
    layers: list[Any] = list(here.layers)
    assert [layer.r["default"] for layer in layers] == list(allocator.ranks.values())
    assert not any(layer.use_adalora["default"] for layer in layers)
    torch.testing.assert_close(here(X), model(X), **CLOSE)
    torch.testing.assert_close(from_peft(plain(), tmp_path)(X), model(X), **CLOSE)


def test_as_plain_lora_a_layer_without_ranks_keeps_one_of_zeros(tmp_path):
    model, _ = with_rank_0()
    save_adapter(model, tmp_path, as_lora=True)
    tensors = tensors_of(tmp_path)
    assert len(tensors) == 2 * len(NAMES)
    assert tensors[f"base_model.model.{NAMES[1]}.lora_A.weight"].shape == (1, 10)
    assert not tensors[f"base_model.model.{NAMES[1]}.lora_A.weight"].any()
    torch.testing.assert_close(from_peft(plain(), tmp_path)(X), model(X), **CLOSE)
    with pytest.raises(ValueError, match="as_lora: got True for a PeftModel"):
        save_adapter(peft_model(), tmp_path, as_lora=True)


# Files and models that do not go together.
def test_other_kinds_and_configurations_that_make_no_sense(tmp_path):
    model, _ = allocated()
    save_adapter(model, tmp_path)
    for dora, kind in ((False, "use_adalora=False, the file use_adalora=True"), (True, "use_dora=True")):
        with pytest.raises(ValueError, match=f"of 'layers.0' has {kind}"):
            load_adapter(patched(use_adalora=False, use_dora=dora), tmp_path)
    pattern = config_of(tmp_path)["rank_pattern"]
    one = next(iter(pattern))
    for changes, message in (
        ({"init_r": 0}, "init_r: got 0, want an integer of at least 1"),
        ({"tinit": 11}, "t_init: got 11 and t_final 2 of 12 steps"),
        ({"beta1": 2}, "beta1: got 2"),
        ({"rank_pattern": {one: 3}}, "want a list of bools for each lora_E"),
        ({"rank_pattern": {**pattern, one: [True]}}, f"rank_pattern: got 1 bools for {one!r}, want init_r, 4"),
        ({"rank_pattern": None}, "lora_A and lora_B and lora_E have rank . and . and ., adapter_config.json says 4"),
        ({"bias": "all"}, "not supported: bias='all'"),
    ):
        text = (tmp_path / "adapter_config.json").read_text()
        edit_config(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load_adapter(plain(), tmp_path)
        (tmp_path / "adapter_config.json").write_text(text)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors.pop(f"base_model.model.{NAMES[0]}.lora_E")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"want lora_A, lora_B, lora_E for every module, got only some .* layers.0"):
        load_adapter(plain(), tmp_path)
    weights = {f"base_model.model.{NAMES[0]}.lora_A.weight": torch.zeros(R, 6)}
    safetensors.torch.save_file({**tensors, **weights}, path)
    with pytest.raises(ValueError, match=r"1 tensors that are no LoRA matrices: .* want keys .* of \.lora_A, \.lora_B"):
        load_adapter(plain(), tmp_path)


def test_a_mixture_of_kinds_is_not_saved(tmp_path):
    model: Any = Net()
    fastlora.patch(model, r=2, use_adalora=True, target_modules=NAMES[:1])
    model.layers[0].add_adapter("other", use_adalora=True)
    fastlora.patch(model, r=2, target_modules=NAMES[1:], adapter_name="other")
    with pytest.raises(ValueError, match=r"of several kinds in different layers \(use_adalora, use_lora\), want one"):
        save_adapter(model, tmp_path, "other")
