"""Names on disk, in patterns and in reports are the unwrapped model's, whatever wraps a part of it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from accelerate.utils import compile_regions
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import fastlora
from fastlora.introspect import names

SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
PROJECTIONS = 7


@pytest.fixture(autouse=True)
def eager():
    """Names need no compiler, which would take most of the time."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def wrap_layers(wrapper):
    def wrap(model: Any) -> Any:
        decoder = model.model
        decoder.layers[1] = wrapper(decoder.layers[1])
        return model

    return wrap


def wrap_decoder(wrapper):
    def wrap(model: Any) -> Any:
        model.model = wrapper(model.model)
        return model

    return wrap


def wrap_leaf(model: Any) -> Any:
    attention = model.model.layers[0].self_attn
    attention.q_proj = checkpoint_wrapper(attention.q_proj)
    return model


WRAPPERS: dict[str, Any] = {
    "compiled block": wrap_layers(compiled),
    "checkpointed block": wrap_layers(checkpoint_wrapper),
    "both": lambda model: wrap_layers(checkpoint_wrapper)(wrap_layers(compiled)(model)),
    "compiled regions": lambda model: compile_regions(model, backend="eager"),
    "data parallel": wrap_decoder(nn.DataParallel),
    "average of a part": wrap_decoder(AveragedModel),
    "average of the whole": AveragedModel,
    "compiled average": lambda model: compiled(AveragedModel(model)),
    "one layer": wrap_leaf,
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batch("llama")["input_ids"]).logits


def keys(directory) -> set[str]:
    return set(safetensors.torch.load_file(directory / "adapter_model.safetensors"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_file_does_not_know_of_wrappers(wrapper, tmp_path):
    plain = tiny_model("llama")
    torch.manual_seed(1)
    fastlora.patch(plain, **SETTINGS)
    fastlora.save_adapter(plain, tmp_path / "plain")
    wrapped = WRAPPERS[wrapper](plain)
    fastlora.save_adapter(wrapped, tmp_path / "wrapped")
    assert len(keys(tmp_path / "plain")) == 2 * 2 * PROJECTIONS
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()

    wanted = logits(plain)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "wrapped")
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(logits(tiny_model("llama")), wanted, atol=1e-3)

    into = WRAPPERS[wrapper](tiny_model("llama"))
    fastlora.load_adapter(into, tmp_path / "wrapped")
    torch.testing.assert_close(logits(into), wanted, rtol=0, atol=1e-6)
    fastlora.load_adapter(into, tmp_path / "wrapped", "second")
    fastlora.set_adapter(into, "second")
    torch.testing.assert_close(logits(into), wanted, rtol=0, atol=1e-6)
    fastlora.unpatch(into)  # looks for the ends that may be tied
    assert torch.equal(logits(into), logits(tiny_model("llama")))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_peft_model_with_wrapped_blocks_saves_and_loads_all_its_tensors(wrapper, tmp_path):
    def model(**settings) -> Any:
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **(SETTINGS | settings))
        made: Any = peft.get_peft_model(tiny_model("llama"), config)
        fastlora.patch(made)
        return made

    def wrap(made: Any) -> Any:
        if "average" in wrapper and wrapper != "average of a part":  # PEFT's models have no averages inside
            return WRAPPERS[wrapper](made)
        made.base_model.model = WRAPPERS[wrapper](made.base_model.model)
        return made

    torch.manual_seed(1)
    made = model()
    wanted = logits(made)
    made.save_pretrained(tmp_path / "plain")
    made = wrap(made)
    fastlora.save_adapter(made, tmp_path / "wrapped")
    assert keys(tmp_path / "wrapped") == keys(tmp_path / "plain")
    assert len(keys(tmp_path / "wrapped")) == 2 * 2 * PROJECTIONS
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "wrapped")
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-6)

    into = wrap(model(init_lora_weights=True))
    fastlora.load_adapter(into, tmp_path / "wrapped")
    torch.testing.assert_close(logits(into), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["both", "average of a part", "one layer"])
def test_patterns_reports_groups_and_sketches_have_the_unwrapped_names(wrapper):
    def what(model: Any) -> list[Any]:
        report = fastlora.patch(
            model,
            r=2,
            target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
            exclude_modules=["model.layers.1.mlp.up_proj"],
            rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 3},
            alpha_pattern={"model.layers.0.self_attn.k_proj": 5},
            group="auto",
            strict=True,
        )
        ranks = {name: (layer.r, layer.lora_alpha) for name, layer in names_of(model)}
        with fastlora.GradientSketch(model, r=1, target_modules=r"model\.layers\.1\..*") as sketch:
            model(**tiny_batch("llama"), use_cache=False).loss.backward()
        fastlora.patch(model, r=2, adapter_name="second", target_modules=["layers.1.mlp.down_proj"])
        return [report.patched, report.left_alone, report.groups, ranks, sketch.names]

    def names_of(model: Any) -> list[tuple[str, Any]]:
        return [(name, m) for name, m in names.named_modules(model) if isinstance(m, fastlora.FusedLoraLinear)]

    wanted = what(tiny_model("llama"))
    assert len(wanted[0]) == 2 * PROJECTIONS - 1
    found = what(WRAPPERS[wrapper](tiny_model("llama")))
    if wrapper == "one layer":  # its neighbours are called by their parent, and it by the wrapper
        del wanted[2], found[2]
    assert found == wanted


@pytest.mark.parametrize("wrapper", ["compiled regions", "data parallel", "compiled average"])
def test_a_wrapped_head_is_still_the_head(wrapper):
    report = fastlora.patch(WRAPPERS[wrapper](tiny_model("llama")))
    assert "output head" in report.left_alone["lm_head"]


def test_a_module_called_module_is_no_wrapper():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.module(x)

    assert fastlora.patch(nn.Sequential(Residual(), nn.Linear(4, 4))).patched == ["0.module", "1"]


def test_an_empty_state_is_not_written(tmp_path):
    made: Any = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    made.peft_config["ghost"] = made.peft_config["default"]
    with pytest.raises(ValueError, match="save_adapter: adapter_name: no tensor of this PeftModel belongs to 'ghost'"):
        fastlora.save_adapter(made, tmp_path)
    assert not list(tmp_path.iterdir())
