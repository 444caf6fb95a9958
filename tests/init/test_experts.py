"""LoRA-GA on a mixture's experts: every expert's gradient is sketched from its own tokens, and starts its part."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from mixtures import experts_in, mixture, step, tokens
from model_state import ModelState
from torch import Tensor, nn

import fastlora
from fastlora.init.lora_ga import undo_lora_ga
from fastlora.init.ranks import fill
from fastlora.integrations.peft.starts import PeftConfiguration
from fastlora.introspect.targets import called, lora_layers

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
    return by_expert_of(model)


def by_expert_of(model: nn.Module) -> dict[str, Tensor]:
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
    train(model, x)
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


@pytest.mark.parametrize("options", [{"layers_at_once": 5}, {"single_pass": True}], ids=["in turns", "single pass"])
def test_starts_for_adam(options):
    """The objectives are those of the exact gradients' signs; the start goes to the expert's part."""
    base, x = mixture("gpt_oss", **SIZES), tokens(6, 40)
    model, r = copy.deepcopy(base), 2
    kinds = [type(module) for module in model.modules()]

    def passes() -> None:
        model(input_ids=x, labels=x).loss.backward()

    chosen: Any = {"target_modules": ["o_proj"], "target_parameters": experts_in(base)}
    found = fastlora.sign_factors(model, passes, r=r, rounds=2, **chosen, **options)
    assert [type(module) for module in model.modules()] == kinds
    base(input_ids=x, labels=x).loss.backward()
    wanted = by_expert_of(base)
    assert set(wanted) | {f"model.layers.{i}.self_attn.o_proj" for i in range(2)} == set(found.layers)
    for name, gradient in wanted.items():
        line = found.layers[name]
        p, q = (line.b.double().t() @ gradient).sign(), (gradient @ line.a.double().t()).sign()
        step, signs = line.b.double() @ p + q @ line.a.double(), gradient.sign()
        exact = 1 - (step * signs).sum() ** 2 / (step.square().sum() * signs.square().sum())
        assert line.objective == pytest.approx(float(exact), abs=1e-4) and line.objective < line.lora_ga
    fastlora.init_lora_ga(model, found, scale="unit")
    assert torch.allclose(model(x).logits, base(x).logits, atol=1e-4)
    layer: Any = dict(lora_layers(model))["model.layers.1.mlp.experts.down_proj"]
    line = found.layers["model.layers.1.mlp.experts.down_proj[2]"]
    assert torch.equal(layer.lora_A["default"].view(4, r, -1)[2], line.a)
    assert torch.equal(layer.lora_B["default"].view(-1, r, 4)[:, :, 2], line.b)


def train(model: nn.Module, x: Tensor) -> None:
    """A step of SGD that shows."""
    step(model, x)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.5 * p.grad


PREFIX = "base_model.model."


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_peft_models(tmp_path, monkeypatch, family, patched):
    """As in a plain model from the same sketch; PEFT's own file, merge and undo know the start."""
    base, x, r = mixture(family, **SIZES), tokens(4, 20), 2
    wanted = gradients(copy.deepcopy(base), x)
    config = {"r": r, "target_modules": ["o_proj"], "target_parameters": experts_in(base), "use_rslora": True}
    model: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config, lora_alpha=8))
    if patched:
        fastlora.patch(model)
    kinds, flags = [type(module) for module in model.modules()], [p.requires_grad for p in model.parameters()]
    sketch = sketched(model, x, r=r, width=6 * r)
    assert [type(module) for module in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == flags
    for name, gradient in wanted.items():
        u, s, vh = sketch.layers[PREFIX + name].svd(2 * r)
        best = torch.linalg.svdvals(gradient)[2 * r :].norm()
        assert (gradient - (u * s).double() @ vh.double()).norm() < 1.02 * best
    plain = copy.deepcopy(base)
    own = sketched(plain, x, r=r, width=6 * r, target_modules=["o_proj"])
    own.layers = {name.removeprefix(PREFIX): layer for name, layer in sketch.layers.items()}
    sizes = fastlora.init_lora_ga(plain, own, lora_alpha=8, use_rslora=True)

    state = ModelState(model)
    with pytest.raises(ValueError, match='base: got "offset"'):
        fastlora.init_lora_ga(model, sketch, base="offset")
    monkeypatch.setattr(PeftConfiguration, "update", lambda self: 1 / 0)  # the last step: all that started goes back
    with pytest.raises(ZeroDivisionError):
        fastlora.init_lora_ga(model, sketch)
    monkeypatch.undo()
    state.assert_unchanged()
    assert fastlora.init_lora_ga(model, sketch) == {PREFIX + name: size for name, size in sizes.items()}
    assert torch.allclose(model(x).logits, base(x).logits, atol=1e-5)
    train(model, x)
    train(plain, x)
    want = plain(x).logits
    assert torch.allclose(model(x).logits, want, atol=1e-4)
    assert not torch.allclose(want, base(x).logits, atol=1e-3)
    assert fastlora.fallbacks(model) == {} if patched else True
    model.save_pretrained(tmp_path)
    assert torch.allclose(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x).logits, want, atol=1e-4)
    back = copy.deepcopy(base)
    fastlora.load_adapter(back, tmp_path)
    assert torch.allclose(back(x).logits, want, atol=1e-4)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.allclose(model(x).logits, want, atol=1e-4)
    undo_lora_ga(model)
    assert torch.equal(model(x).logits, peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))(x).logits)


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_hot_experts_get_more(tmp_path, kind):
    """Ranks are those of the exact singular values; what an expert has less than the file stays zero."""
    base, x, r = mixture("qwen3_moe", **SIZES), tokens(6, 40), 2
    weights = experts_in(base)
    wanted = {name: torch.linalg.svdvals(g).square() for name, g in gradients(copy.deepcopy(base), x).items()}
    pairs = {name: [float(s[2 * k] + s[2 * k + 1]) for k in range(5)] for name, s in wanted.items()}
    costs = {name: 56 + (96 if "gate_up" in name else 48) for name in pairs}
    exact = fill(pairs, costs, sum(r * cost for cost in costs.values()), 1)
    plain = copy.deepcopy(base)
    sketch = sketched(plain, x, r=r, width=24, target_modules=[])
    ranks = fastlora.allocate_ranks(sketch, max_rank=5)
    assert {name: ranks[name] for name in exact} == exact and len(set(ranks.values())) > 2
    most = {weight: max(ranks[f"{weight}[{e}]"] for e in range(4)) for weight in sketch.experts}
    if kind == "plain":
        model: Any = plain
        fastlora.init_lora_ga(model, sketch, ranks=ranks)
        assert {name: layer.r["default"] for name, layer in lora_layers(model)} == most
        assert {layer.scaling["default"] for _, layer in lora_layers(model)} == {16 / r}
    else:
        patterns: Any = {"rank_pattern": most, "alpha_pattern": {name: 8 * rank for name, rank in most.items()}}
        config = peft.LoraConfig(r=r, target_modules=[], target_parameters=weights, **patterns)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        sketch = sketched(model, x, r=r, width=24)
        ranks = {PREFIX + name: rank for name, rank in ranks.items()}
        with pytest.raises(ValueError, match=r"r: the sketch has r=2, but the adapter 'default' of .* has r="):
            fastlora.init_lora_ga(model, sketch)
        fastlora.init_lora_ga(model, sketch, ranks=ranks)
    assert torch.allclose(model(x).logits, base(x).logits, atol=1e-5)
    train(model, x)
    want = model(x).logits
    for name, layer in lora_layers(model):
        weight = called(name, layer)
        if kind == "plain":
            a, b = layer.lora_A["default"], layer.lora_B["default"]
        else:
            a, b = layer.lora_A["default"].trained, layer.lora_B["default"].trained
        a, b = a.view(4, -1, a.shape[1]), b.view(len(b), -1, 4)
        for expert in range(4):
            rank = ranks[f"{weight}[{expert}]"]
            assert a[expert, :rank].norm(dim=1).min() > 0 and b[:, :rank, expert].norm(dim=0).min() > 0
            assert not a[expert, rank:].any() and not b[:, rank:, expert].any()
    (fastlora.save_adapter if kind == "plain" else type(model).save_pretrained)(model, tmp_path)
    assert torch.allclose(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x).logits, want, atol=1e-4)


def test_what_is_refused():
    model, x = mixture("qwen3_moe", **SIZES), tokens(4, 20)
    sketch = sketched(model, x, r=2, target_modules=["o_proj"])
    with pytest.raises(ValueError, match=r'base: got "offset", and .*\[0\]. is an expert; want "exact"'):
        fastlora.init_lora_ga(model, sketch, base="offset")
    assert not fastlora.is_patched(model)
    with pytest.raises(ValueError, match=r"reinit_lora_ga: sketch: got experts' weights \(model.layers.0.mlp.experts"):
        fastlora.reinit_lora_ga(model, sketch)
    with pytest.raises(ValueError, match=r"no experts' weight 'model.layers.0.mlp.experts.gate_up_proj'"):
        fastlora.init_lora_ga(mixture("qwen3_moe"), sketch)
    with pytest.raises(ValueError, match=r"GradientSketch: target_parameters: no parameter is called 'gone'"):
        fastlora.GradientSketch(model, target_parameters=["gone"])
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["experts.down_proj"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj\[0\]. was sketched and is not patched"):
        fastlora.init_lora_ga(adapted, sketched(adapted, x, r=2))
    with pytest.raises(ValueError, match=r"AlignmentMonitor: target_parameters: got .*gate_up_proj, .* no adapter"):
        fastlora.AlignmentMonitor(adapted, target_parameters=["gate_up_proj"])
