"""Adapter files: ours read by PEFT, PEFT's read by ours, and everything that can be wrong with them."""

from __future__ import annotations

import copy
import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from tiny_models import tiny_model
from torch import nn

import fastlora
from fastlora import load_adapter, save_adapter
from fastlora.layers.linear import FusedLoraLinear

K, N = 12, 10
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def mlp(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K), nn.Tanh(), nn.Linear(K, N, bias=False)).to(dtype)


def llama() -> Any:
    return tiny_model("llama")


def gpt2() -> Any:
    return tiny_model("gpt2")


def patched(model=None, seed=1, **settings) -> Any:
    """A patched model whose adapters are not zero."""
    model = mlp() if model is None else model
    torch.manual_seed(seed)
    fastlora.patch(model, **{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings})
    return model


def adapter_state(model, adapter_name="default"):
    return {k: v.clone() for k, v in model.state_dict().items() if f".{adapter_name}" in k and "lora_" in k}


def logits(model, x):
    model.eval()
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def from_peft(base, directory) -> Any:
    """PEFT's loader; any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's use of transformers
        return peft.PeftModel.from_pretrained(base, directory)


def config_of(directory) -> dict[str, Any]:
    return json.loads((Path(directory) / "adapter_config.json").read_text())


def edit_config(directory, **changes):
    (Path(directory) / "adapter_config.json").write_text(json.dumps({**config_of(directory), **changes}))


def edit_tensors(directory, change):
    path = Path(directory) / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


# Both ways with PEFT.
CASES = {
    "plain": (mlp, {}),
    "rslora": (mlp, {"use_rslora": True, "lora_dropout": 0.1}),
    "dora": (mlp, {"use_dora": True}),
    "patterns": (mlp, {"rank_pattern": {"2": 5}, "alpha_pattern": {"^4": 7}, "use_rslora": True}),
    "some": (mlp, {"target_modules": ["0", "4"]}),
    "one": (mlp, {"target_modules": ["2"], "lora_alpha": 2.5}),
    "llama": (llama, {}),
    "llama-qv": (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "llama-layer": (llama, {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"}),
    "llama-patterns": (
        llama,
        {"rank_pattern": {"q_proj": 2, r"^model.layers.1.mlp.*": 4}, "alpha_pattern": {"q_proj": 3.5}},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
}


def example(make):
    return torch.randn(4, K) if make is mlp else torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_saved(case, tmp_path):
    make, settings = CASES[case]
    model = patched(make(), **settings)
    save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    loaded = from_peft(make(), tmp_path)
    x = example(make)
    assert torch.allclose(logits(model, x), logits(loaded, x), atol=1e-6)
    assert not torch.allclose(logits(make(), x), logits(loaded, x), atol=1e-4)
    ours = {name for name, m in model.named_modules() if isinstance(m, FusedLoraLinear)}
    theirs = {name for name, m in loaded.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert ours == theirs
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3, settings.get("lora_alpha", 5))
    assert config.lora_dropout == settings.get("lora_dropout", 0.0)
    assert config.inference_mode


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_loads_here(case, tmp_path):
    make, settings = CASES[case]
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["0", "2", "4"], **settings}
    if make is not mlp and settings["target_modules"] == ["0", "2", "4"]:
        settings["target_modules"] = "all-linear"
    torch.manual_seed(1)
    config = peft.LoraConfig(**settings, fan_in_fan_out=make is gpt2)
    theirs = peft.get_peft_model(make(), config)
    theirs.save_pretrained(tmp_path)
    model = make()
    load_adapter(model, tmp_path)
    x = example(make)
    assert torch.allclose(logits(model, x), logits(theirs, x), atol=1e-6)
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    assert layer.lora_dropout["default"] == settings.get("lora_dropout", 0.0)
    assert layer.active_adapters == ["default"]
    again = tmp_path / "again"
    save_adapter(model, again)
    first, second = (safetensors.torch.load_file(d / FILES[1]) for d in (tmp_path, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_layers_that_differ_in_rslora_keep_their_scales(tmp_path):
    model = mlp()
    torch.manual_seed(1)
    fastlora.patch(model, r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    fastlora.patch(
        model, r=9, lora_alpha=6, target_modules=["4"], use_rslora=True, init_lora_weights=False, lora_dropout=0.5
    )
    with pytest.warns(UserWarning, match="lora_dropout"):
        save_adapter(model, tmp_path)
    loaded = from_peft(mlp(), tmp_path)
    assert loaded.base_model.model[4].scaling["default"] == pytest.approx(2.0)
    x = torch.randn(4, K)
    assert torch.allclose(logits(model, x), logits(loaded, x), atol=1e-6)
    again = mlp()
    load_adapter(again, tmp_path)
    assert torch.allclose(logits(model, x), logits(again, x), atol=1e-6)


def test_a_name_that_ends_another_module_s_name(tmp_path):
    """`up` and `inner.up`: a list of endings would select both."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(K, K)
            self.inner = nn.ModuleDict({"up": nn.Linear(K, K)})

        def forward(self, x):
            return self.inner["up"](self.up(x))

    model = Nested()
    torch.manual_seed(1)
    fastlora.patch(model, target_modules="up", init_lora_weights=False)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == "up"
    x = torch.randn(2, K)
    assert torch.allclose(logits(from_peft(Nested(), tmp_path), x), logits(model, x), atol=1e-6)
    again = Nested()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, x), logits(model, x))


def test_target_modules_are_the_shortest_names(tmp_path):
    model = patched(llama(), target_modules=["q_proj", "v_proj"])
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["q_proj", "v_proj"]
    model = patched(llama(), target_modules=["layers.0.self_attn.q_proj"])
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def test_dtypes(tmp_path):
    model = patched(mlp(torch.bfloat16))
    save_adapter(model, tmp_path)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / FILES[1]).values()} == {torch.float32}
    edit_tensors(tmp_path, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    again = mlp(torch.bfloat16)
    load_adapter(again, tmp_path)
    for name, value in adapter_state(again).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, adapter_state(model)[name].bfloat16().float())


def test_a_single_layer(tmp_path):
    layer = nn.Linear(K, N)
    before = copy.deepcopy(layer)
    patched(layer)
    save_adapter(layer, tmp_path)
    load_adapter(before, tmp_path)
    x = torch.randn(2, K)
    assert torch.equal(layer(x), before(x))


# Several adapters.
def test_all_adapters_or_one(tmp_path):
    model = patched()
    patched(model, seed=2, adapter_name="fr", r=2)
    save_adapter(model, tmp_path / "all")
    assert sorted(os.listdir(tmp_path / "all")) == [*FILES, "fr"]
    save_adapter(model, tmp_path / "fr", "fr")
    assert sorted(os.listdir(tmp_path / "fr")) == FILES
    for file in FILES:
        assert (tmp_path / "fr" / file).read_bytes() == (tmp_path / "all" / "fr" / file).read_bytes()
    again = mlp()
    load_adapter(again, tmp_path / "all")
    load_adapter(again, tmp_path / "fr", "fr")
    for name in ("default", "fr"):
        ours, theirs = adapter_state(model, name), adapter_state(again, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again[0].active_adapters == ["default"]  # type: ignore[union-attr]
    (tmp_path / "all" / FILES[0]).unlink()
    with pytest.raises(FileNotFoundError, match="subdirectories fr"):
        load_adapter(mlp(), tmp_path / "all")


def test_an_adapter_that_reaches_further_than_the_one_there(tmp_path):
    save_adapter(patched(), tmp_path)
    model = patched(target_modules=["0"])
    x = torch.randn(2, K)
    want = logits(model, x)
    load_adapter(model, tmp_path, "wide")
    assert torch.equal(logits(model, x), want)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "wide" in name)
    fastlora.set_adapter(model, "wide")
    assert torch.allclose(logits(model, x), logits(patched(), x), atol=1e-6)


def test_an_adapter_is_overwritten(tmp_path):
    saved = patched(lora_alpha=9, use_rslora=True)
    save_adapter(saved, tmp_path)
    model = patched(seed=5)
    load_adapter(model, tmp_path)
    x = torch.randn(2, K)
    assert torch.equal(logits(model, x), logits(saved, x))


# PEFT models.
@pytest.mark.parametrize("accelerated", [False, True])
def test_peft_models_save_and_load_themselves(accelerated, tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    model: Any = peft.get_peft_model(mlp(), config)
    if accelerated:
        fastlora.patch(model)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    load_adapter(model, tmp_path / "ours", "again")
    model.set_adapter("again")
    x = torch.randn(2, K)
    with_again = logits(model, x)
    model.set_adapter("default")
    assert torch.equal(logits(model, x), with_again)
    save_adapter(patched(target_modules=["4"]), tmp_path / "other")
    load_adapter(model, tmp_path / "other", "other")
    assert fastlora.is_patched(model) is accelerated
    assert (type(model.base_model.model[4]).__name__ == "FusedPeftLinear") is accelerated
    save_adapter(model, tmp_path / "all")
    model.save_pretrained(tmp_path / "all-theirs")
    assert contents(tmp_path / "all").keys() == contents(tmp_path / "all-theirs").keys()
    save_adapter(model, tmp_path / "one", "other")
    assert config_of(tmp_path / "one")["target_modules"] == ["4"]


def test_a_file_that_does_not_fit_leaves_a_peft_model_as_it_was(tmp_path):
    save_adapter(patched(), tmp_path)
    edit_config(tmp_path, r=4)
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("new", "default"):  # both reach layer 4, which has no adapter yet
        edit_tensors(tmp_path, lambda t: t.update({"base_model.model.4.lora_A.weight": torch.zeros(2, 2)}))
        with pytest.raises(ValueError, match="does not fit this PeftModel"):
            load_adapter(model, tmp_path, name)
        assert list(model.peft_config) == ["default"]
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ctrl_c_while_peft_loads_leaves_its_model_as_it_was(tmp_path, monkeypatch):
    save_adapter(patched(), tmp_path)
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
    before, load = {name: value.clone() for name, value in model.state_dict().items()}, model.load_adapter

    def interrupted(*args, **kwargs):
        load(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "load_adapter", interrupted)
    for name in ("new", "default"):
        with pytest.raises(KeyboardInterrupt):
            load_adapter(model, tmp_path, name)
        assert list(model.peft_config) == ["default"] and model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_peft_layers_without_a_peft_model_are_refused(tmp_path):
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), mlp())
    with pytest.raises(ValueError, match="want the PeftModel"):
        save_adapter(model, tmp_path)
    assert os.listdir(tmp_path) == []


# Files that are wrong. The model stays as it was.
def assert_refused(directory, match, error: type[Exception] = ValueError, model: Any = None, name="default"):
    model = mlp() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        load_adapter(model, directory, name)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.fixture
def saved(tmp_path):
    save_adapter(patched(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_missing_files(saved, tmp_path):
    assert_refused(tmp_path / "nowhere", "does not exist", FileNotFoundError)
    assert_refused(saved / FILES[0], "is a file", FileNotFoundError)
    (saved / FILES[0]).rename(saved / "kept")
    assert_refused(saved, "no adapter_config.json", FileNotFoundError)
    (saved / "kept").rename(saved / FILES[0])
    (saved / FILES[1]).unlink()
    assert_refused(saved, "no adapter_model.safetensors", FileNotFoundError)
    torch.save({}, saved / "adapter_model.bin")
    assert_refused(saved, "pickle.*save it again with save_pretrained")


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_truncated_weights(saved, length):
    path = saved / FILES[1]
    path.write_bytes(path.read_bytes()[:length])
    assert_refused(saved, "truncated or not a safetensors file")
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=3, target_modules=["0"]))
    assert_refused(saved, "truncated or not a safetensors file", model=model, name="new")
    assert list(model.peft_config) == ["default"]


def test_configurations_that_are_no_lora(saved):
    for text, match in (("{", "not valid JSON"), ("[]", "peft_type: got None"), ('{"peft_type": "IA3"}', "got 'IA3'")):
        (saved / FILES[0]).write_text(text)
        assert_refused(saved, match)
    (saved / FILES[0]).write_bytes(b"\xff\xfe\x00")
    assert_refused(saved, "not valid JSON")


@pytest.mark.parametrize(
    "change",
    [
        {"lora_bias": True},
        {"bias": "all"},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [1]},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"use_qalora": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unsupported_features(saved, change):
    edit_config(saved, **change)
    assert_refused(saved, f"not supported: {next(iter(change))}=")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"r": 0}, "r: got 0"),
        ({"r": "8"}, "r: got '8'"),
        ({"r": None}, "r: got None"),
        ({"lora_alpha": None}, "lora_alpha: got None"),
        ({"lora_dropout": 2}, "lora_dropout: got 2"),
        ({"rank_pattern": {"0": -1}}, "r: got -1"),
        ({"rank_pattern": {"(": 3}}, "is no regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern: got \[1\]"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"exclude_modules": 3}, "exclude_modules: got 3"),
        ({"layers_to_transform": "1"}, "layers_to_transform: got '1'"),
        ({"target_modules": None}, "target_modules: got None"),
        ({"target_modules": ["0"]}, "does not select 2, 4"),
        ({"r": 4}, "rank 3 and 3, adapter_config.json says 4"),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(saved, change, match):
    edit_config(saved, **change)
    assert_refused(saved, match)


def test_keys_and_shapes_that_do_not_fit(saved):
    a0, b0 = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
    original = (saved / FILES[1]).read_bytes()

    def refused(change, match, **kwargs):
        (saved / FILES[1]).write_bytes(original)
        edit_tensors(saved, change)
        assert_refused(saved, match, **kwargs)

    refused(lambda t: t.pop(a0), "got only some of them for 0")
    refused(lambda t: (t.pop(a0), t.pop(b0)), "no weights for 0, which it targets")
    refused(lambda t: t.clear(), "holds no tensors")
    refused(
        lambda t: t.update({a0: torch.zeros(3, K + 1)}), rf"lora_A of '0': got shape \(3, {K + 1}\), want \(3, {K}\)"
    )
    refused(
        lambda t: t.update({b0: torch.zeros(N + 1, 3)}), rf"lora_B of '0': got shape \({N + 1}, 3\), want \({N}, 3\)"
    )
    refused(lambda t: t.update({b0: torch.zeros(N, 2)}), "rank 3 and 2")
    refused(lambda t: t.update({a0: torch.zeros(3)}), "no LoRA matrices: base_model.model.0.lora_A.weight")
    refused(lambda t: t.update({"base_model.model.0.lora_magnitude_vector": torch.zeros(N)}), "lora_magnitude_vector")
    refused(lambda t: t.update({a0: t[a0].int()}), "torch.int32")
    other = {
        "base_model.model.9.lora_A.weight": torch.zeros(3, K),
        "base_model.model.9.lora_B.weight": torch.zeros(N, 3),
    }
    refused(lambda t: t.update(other), "weights for 9, which this Sequential has not")
    refused(lambda t: None, "got shape", model=nn.Sequential(*[nn.Linear(7, 7) for _ in range(5)]))


def test_modules_that_cannot_carry_an_adapter(saved):
    class Custom(nn.Linear):
        pass

    model = mlp()
    model[2] = Custom(N, K)
    assert_refused(saved, "'2' cannot carry an adapter: Custom", model=model)


def test_selection_by_layer_number(tmp_path):
    """`layers_to_transform` and `exclude_modules` mean what they mean in PEFT."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"],
        layers_to_transform=[1],
        exclude_modules=["mlp.up_proj"],
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    found = [name for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)]
    assert found == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    edit_config(tmp_path, layers_to_transform=0, layers_pattern="layers")
    assert_refused(tmp_path, "no weights for model.layers.0.self_attn.q_proj", model=llama())


def test_adapters_that_are_there_already(saved):
    assert_refused(saved, "got shape", model=patched(r=4))
    assert_refused(saved, "exists already, and not in 2, 4", model=patched(target_modules=["0"]))
    model = patched()
    fastlora.merge(model)
    assert_refused(saved, "merged into '0'", model=model)
    assert_refused(saved, "adapter_name: got 'a.b'", name="a.b")
    edit_config(saved, target_modules=["0", "2"])
    edit_tensors(saved, lambda t: [t.pop(key) for key in list(t) if ".4." in key])
    assert_refused(saved, "also in 4, for which there are no weights", model=patched())


@pytest.mark.parametrize("patched_before", [False, True])
def test_a_failure_while_adding_takes_everything_back(patched_before, saved, monkeypatch):
    edit_config(saved, rank_pattern={"2": 5})
    edit_tensors(
        saved,
        lambda t: t.update(
            {"base_model.model.2.lora_A.weight": torch.ones(5, N), "base_model.model.2.lora_B.weight": torch.ones(K, 5)}
        ),
    )
    add_adapter = FusedLoraLinear.add_adapter

    def out_of_memory(self, name, r=8, *args, **kwargs):
        if r == 5:
            raise RuntimeError("out of memory")
        add_adapter(self, name, r, *args, **kwargs)

    monkeypatch.setattr(FusedLoraLinear, "add_adapter", out_of_memory)
    assert_refused(saved, "out of memory", RuntimeError, patched(target_modules=["0"]) if patched_before else None, "b")


# Directories that cannot be written.
def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def test_wrong_calls_of_save(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="which is a file"):
        save_adapter(patched(), tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="save_adapter: directory: cannot write"):
        save_adapter(patched(), tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(mlp(), tmp_path / "new")
    with pytest.raises(ValueError, match=r"adapter_name: got 'nope', want one of \['default'\]"):
        save_adapter(patched(), tmp_path / "new", "nope")
    with pytest.raises(ValueError, match="model: got int"):
        save_adapter(3, tmp_path / "new")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write"):
        save_adapter(patched(), tmp_path)
    tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("peft_model", [False, True])
@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(where, fails_at, peft_model, tmp_path, monkeypatch):
    def model(seed):
        if not peft_model:
            return patched(seed=seed)
        base = mlp()
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))

    save_adapter(model(1), tmp_path / "there")
    before = contents(tmp_path)
    real, calls = getattr(os, where), []

    def no_space(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    for directory in ("there", "new/deep"):
        calls.clear()
        with monkeypatch.context() as patcher:
            patcher.setattr(os, where, no_space)
            with pytest.raises(OSError, match="cannot write") as error:
                save_adapter(model(2), tmp_path / directory)
        assert error.value.errno == errno.ENOSPC
        assert contents(tmp_path) == before
        assert not (tmp_path / "new").exists()
    save_adapter(model(2), tmp_path / "there")
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert after[Path("there") / FILES[1]] != before[Path("there") / FILES[1]]


def test_a_link_to_the_old_weights_keeps_them(tmp_path):
    """A rename, not an overwrite: whoever has the old file open or linked goes on reading it whole."""
    save_adapter(patched(), tmp_path / "a")
    os.link(tmp_path / "a" / FILES[1], tmp_path / "old")
    before = (tmp_path / "old").read_bytes()
    save_adapter(patched(seed=2), tmp_path / "a")
    assert (tmp_path / "old").read_bytes() == before != (tmp_path / "a" / FILES[1]).read_bytes()


def test_sharded_parameters_are_refused(tmp_path):
    model = patched()
    model[0].lora_A["default"].data = torch.empty(0)
    with pytest.raises(ValueError, match=r"lora_A of '0' is a \(0,\) tensor .* gather"):
        save_adapter(model, tmp_path)
    assert os.listdir(tmp_path) == []
