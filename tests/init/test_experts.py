"""LoRA-GA on a mixture's experts: every expert's gradient is sketched from its own tokens, and starts its part."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from mixtures import experts_in, mixture, step, tokens
from torch import Tensor, nn

import fastlora
from fastlora.init.lora_ga import undo_lora_ga
from fastlora.introspect.targets import lora_layers

SIZES = {"hidden_size": 56, "moe_intermediate_size": 48, "intermediate_size": 48}


def sketched(model: Any, x: Tensor, **settings: Any) -> fastlora.GradientSketch:
    with fastlora.GradientSketch(model, target_parameters=experts_in(model), **settings) as sketch:
        for batch in x.chunk(2):
            model(input_ids=batch, labels=batch).loss.backward()
    return sketch


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each expert's (out, in), by the sketch's names."""
    for batch in x.chunk(2):
        model(input_ids=batch, labels=batch).loss.backward()  # type: ignore[operator]
    return {
        f"{name}[{expert}]": (part.t() if model.get_submodule(name.rpartition(".")[0]).is_transposed else part).double()
        for name, p in model.named_parameters()
        if p.dim() == 3 and p.grad is not None and ".experts." in name
        for expert, part in enumerate(p.grad)
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_alignment_is_that_of_each_experts_svd(family):
    """The error of rank 2r next to the best one's (Eckart and Young), and the model is as it was."""
    base, x, r = mixture(family, **SIZES), tokens(6, 40), 2
    model = copy.deepcopy(base)
    kinds = [type(module) for module in model.modules()]
    sketch = sketched(model, x, r=r, width=6 * r, target_modules=[])
    assert [type(module) for module in model.modules()] == kinds and all(p.grad is None for p in model.parameters())
    wanted = gradients(base, x)
    assert set(sketch.names) == set(wanted)

    def errors() -> list[float]:
        found = []
        for name, gradient in wanted.items():
            u, s, vh = sketch.layers[name].svd(2 * r)
            best = torch.linalg.svdvals(gradient)[2 * r :].norm()
            found.append(float((gradient - (u * s).double() @ vh.double()).norm() / best))
        return found

    assert max(errors()) < 1.02 and sum(errors()) / len(wanted) < 1.01
    assert max(abs(sketch.layers[n].squared_norm() / float(g.square().sum()) - 1) for n, g in wanted.items()) < 0.2
    with sketch.refine():
        for batch in x.chunk(2):
            model(input_ids=batch, labels=batch).loss.backward()
    assert max(errors()) < 1.005 and sum(errors()) / len(wanted) < 1.001


def test_starts_keep_the_first_output_and_the_file_is_pefts(tmp_path):
    base, x = mixture("qwen3_moe", **SIZES), tokens(4, 20)
    for settings in ({"target_modules": []}, {"target_modules": ["o_proj"]}):
        model = copy.deepcopy(base)
        sketch = sketched(model, x, r=2, **settings)
        sketch.save(tmp_path / "sketch")
        sketch = fastlora.GradientSketch.load(tmp_path / "sketch", model)
        sizes = fastlora.init_lora_ga(model, sketch, norm_clip=0.5)
        assert len(sizes) == 16 + (2 if settings["target_modules"] else 0) and all(0 < v <= 0.5 for v in sizes.values())
        assert torch.allclose(model(x).logits, base(x).logits, atol=1e-5)
        layer: Any = dict(lora_layers(model))["model.layers.0.mlp.experts.down_proj"]
        a = layer.lora_A["default"].view(4, 2, -1)[1]
        _, _, vh = sketch.layers["model.layers.0.mlp.experts.down_proj[1]"].svd(2)
        assert torch.allclose(a / a.norm(dim=1, keepdim=True), vh, atol=1e-4)
    step(model, x)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.5 * p.grad
    want = model(x).logits
    assert not torch.allclose(want, base(x).logits, atol=1e-3)
    fastlora.save_adapter(model, tmp_path / "adapter")
    assert fastlora.verify_adapter(model, tmp_path / "adapter").ok
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.allclose(loaded(x).logits, want, atol=1e-4)
    fastlora.merge(model)
    assert torch.allclose(model(x).logits, want, atol=1e-4)
    fastlora.unmerge(model)
    undo_lora_ga(model)
    assert torch.equal(model(x).logits, base(x).logits) and not len(layer.lora_A0)


def test_experts_without_tokens_start_as_lora_does():
    model, x = mixture("qwen3_moe", **SIZES), tokens(1, 4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0.0
            layer.mlp.gate.weight[:3] = layer.mlp.gate.weight[:3].abs()
            layer.post_attention_layernorm.weight.zero_().add_(1.0)
    sketch = sketched(model, x, r=2, target_modules=[])
    without = [name for name in sketch.names if not sketch.has_gradient(name)]
    assert 0 < len(without) < len(sketch.names)
    with pytest.raises(ValueError, match=f"{len(without)} of 16 layers have no gradient: model.layers"):
        fastlora.init_lora_ga(model, sketch)
    want = model(x).logits
    sizes = fastlora.init_lora_ga(model, sketch, missing="kaiming")
    assert {name for name, size in sizes.items() if size == 0} == set(without)
    assert torch.allclose(model(x).logits, want, atol=1e-5)
    for name in without:
        layer: Any = dict(lora_layers(model))[name.rpartition("[")[0]]
        expert = int(name[-2])
        assert layer.lora_A["default"].view(4, 2, -1)[expert].any()
        assert not layer.lora_B["default"].view(-1, 2, 4)[:, :, expert].any()


def test_what_is_refused():
    model, x = mixture("qwen3_moe", **SIZES), tokens(4, 20)
    sketch = sketched(model, x, r=2, target_modules=["o_proj"])
    ranks = fastlora.allocate_ranks(sketch)
    assert all("experts" not in name for name in ranks)
    name = sketch.names[-1]
    with pytest.raises(ValueError, match=r"init_lora_ga: ranks: got one for .* experts all have the sketch's r"):
        fastlora.init_lora_ga(model, sketch, ranks={name: 1})
    with pytest.raises(ValueError, match=r'base: got "offset", and .*\[0\]. is an expert; want "exact"'):
        fastlora.init_lora_ga(model, sketch, base="offset")
    assert not fastlora.is_patched(model)
    with pytest.raises(ValueError, match=r"no experts' weight 'model.layers.0.mlp.experts.gate_up_proj'"):
        fastlora.init_lora_ga(mixture("qwen3_moe"), sketch)
    with pytest.raises(ValueError, match=r"GradientSketch: target_parameters: no parameter is called 'gone'"):
        fastlora.GradientSketch(model, target_parameters=["gone"])
    config = peft.LoraConfig(target_modules=["o_proj"], target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match=r"GradientSketch: target_parameters: .* this is a PEFT model"):
        fastlora.GradientSketch(peft.get_peft_model(model, config), target_parameters=["down_proj"])
