"""LoRA on embeddings in whole models: PEFT's numbers and files, tied heads, and all that a patched layer promises."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from model_state import ModelState
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import fastlora
from fastlora.layers.embedding import FusedLoraEmbedding

BATCH = tiny_batch("llama")
IDS = BATCH["input_ids"]
TARGETS = ["q_proj", "embed_tokens"]


def gemma() -> Any:
    """Its embedding scales its rows."""
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=12, pad_token_id=0)
    return Gemma3ForCausalLM(config).eval()


MODELS: dict[str, Any] = {
    "untied": (lambda: tiny_model("llama"), TARGETS),
    "tied": (lambda: tiny_model("qwen3"), [*TARGETS, "lm_head"]),
    "scaled": (gemma, TARGETS),
    "two of them": (lambda: tiny_model("gpt2"), ["wte", "wpe", "c_attn"]),
}


def moved(model: nn.Module, scale: float = 0.1) -> Any:
    """The model, with adapters as after training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def patched(kind: str = "untied", **settings: Any) -> Any:
    make, targets = MODELS[kind]
    model = make()
    fastlora.patch(model, **{"r": 4, "target_modules": targets, **settings})
    return moved(model)


def peft_model(model: nn.Module, targets: list[str], **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's word on tied targets
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **settings)).eval()


def embeddings(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedLoraEmbedding)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_pefts_and_files_go_both_ways(kind, base_dtype, tmp_path):
    make, targets = MODELS[kind]
    base = make().to(base_dtype)
    theirs = moved(peft_model(copy.deepcopy(base), targets, use_rslora=True, lora_alpha=8))
    ours = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    fastlora.load_adapter(ours, tmp_path / "theirs")
    assert len(embeddings(ours)) == (2 if kind == "two of them" else 1)

    losses = [model(**BATCH).loss for model in (ours, theirs)]
    tight = base_dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-5 if tight else 2e-2, atol=0)
    for loss in losses:
        loss.backward()
    wanted = {name.removesuffix(".default.weight"): p.grad for name, p in theirs.base_model.model.named_parameters()}
    wanted |= {name.removesuffix(".default"): grad for name, grad in wanted.items()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            want = wanted[name.removesuffix(".default")]
            assert want is not None and parameter.grad is not None and parameter.grad.dtype == torch.float32
            error = (parameter.grad - want).norm() / want.norm()
            assert error <= (1e-4 if tight else 5e-2), f"{name}: {error}"
            compared += 1
    assert compared == 2 * len(ours._fastlora_patched)

    fastlora.save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=0, atol=0)
    reloaded = copy.deepcopy(base)
    fastlora.load_adapter(reloaded, tmp_path / "ours")
    assert torch.equal(reloaded(IDS).logits, ours(IDS).logits)


def test_it_starts_as_in_peft():
    for init, started in ((True, False), ("pissa", False), (False, True)):
        model: Any = tiny_model("llama")
        report = fastlora.patch(model, r=4, target_modules=["embed_tokens"], init_lora_weights=init)
        layer: Any = model.model.embed_tokens
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        assert a.shape == (4, 61) and b.shape == (24, 4) and a.any() == started and 0.8 < b.std() < 1.2
        assert ("init_lora_weights=True, as in PEFT" in report.summary) == isinstance(init, str)
        assert torch.equal(model(IDS).logits, tiny_model("llama")(IDS).logits) != started
    plain: Any = tiny_model("llama")
    assert torch.equal(layer.weight, plain.model.embed_tokens.weight), "PiSSA is the linear layers'"


@pytest.mark.parametrize("kind", MODELS)
def test_merging_disabling_and_unpatching_give_the_bits_back(kind):
    make, targets = MODELS[kind]
    model = make()
    before, logits = ModelState(model), model(IDS).logits
    fastlora.patch(model, r=4, target_modules=targets)
    adapted = moved(model)(IDS).logits
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    own = head.weight.detach().clone()
    fastlora.merge(model)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-5)
    assert head.weight is not embedding.weight and model.config.tie_word_embeddings is False
    assert "lm_head" in targets or torch.equal(head.weight, own), "the head has no adapter"
    model.tie_weights()
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-5)
    with fastlora.disable_adapter(model):
        assert torch.equal(model(IDS).logits, logits)
    assert all(layer.merged_adapters for layer in embeddings(model))
    fastlora.unmerge(model)
    assert torch.equal(model(IDS).logits, adapted) and (head.weight is embedding.weight) == tied
    fastlora.merge(model)
    fastlora.unpatch(model)
    before.assert_unchanged()
    assert torch.equal(model(IDS).logits, logits)


def test_several_adapters_active_together_switched_and_mixed_in_a_batch():
    model = patched()
    fastlora.patch(model, r=2, target_modules=["embed_tokens"], adapter_name="b", lora_alpha=3)
    moved(model)
    one, layer = model(IDS).logits, model.model.embed_tokens
    fastlora.set_adapter(model, "b")
    assert not layer.lora_embedding_A["default"].requires_grad and layer.lora_embedding_A["b"].requires_grad
    two = model(IDS).logits
    fastlora.set_adapter(model, ["default", "b"])
    rows = sum(layer.scaling[n] * layer.lora_A[n].t()[IDS] @ layer.lora_B[n].t() for n in ("default", "b"))
    torch.testing.assert_close(layer(IDS), layer.weight[IDS] + rows)
    with fastlora.disable_adapter(model):
        base = model(IDS).logits
    for names, wanted in ((["b", "default"], (two, one)), (["__base__", "b"], (base, two))):
        with fastlora.adapter_names(model, names):
            mixed = model(IDS).logits
        for i, want in enumerate(wanted):
            torch.testing.assert_close(mixed[i], want[i], rtol=1e-4, atol=1e-5)
    assert layer.calls.fused and layer.calls.base
    fastlora.add_weighted_adapter(model, {"default": 0.5, "b": -2.0}, "mix")
    deltas = {name: layer.get_delta_weight(name) for name in ("default", "b", "mix")}
    torch.testing.assert_close(deltas["mix"], 0.5 * deltas["default"] - 2 * deltas["b"])
    fastlora.delete_adapter(model, "b")
    fastlora.set_adapter(model, "default")
    assert "b" not in layer.lora_embedding_A and torch.equal(model(IDS).logits, one)
    fastlora.merge(model)
    with fastlora.adapter_names(model, ["default", "default"]), pytest.raises(ValueError, match="are merged into"):
        layer(IDS)


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    model(**BATCH).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_copies_states_checkpoints_and_compiled_layers():
    model = patched("tied").train()
    wanted, logits = gradients(model), model(IDS).logits
    assert len(wanted) == 2 * len(model._fastlora_patched)
    fresh = patched("tied", init_lora_weights=False).train()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), fresh):
        assert torch.equal(other(IDS).logits, logits)
        for got, want in zip(gradients(other), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert model.state_dict().keys() >= {f"model.embed_tokens.lora_embedding_{factor}.default" for factor in "AB"}
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for got, want in zip(gradients(other), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    layer = model.model.embed_tokens
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = [
        torch.autograd.grad(run(IDS).square().sum(), layer.trained_parameters("default")) for run in (layer, compiled)
    ]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_is_left_alone_says_why():
    class Odd(nn.Embedding):
        pass

    model = nn.ModuleDict({"odd": Odd(9, 4), "bounded": nn.Embedding(9, 4, max_norm=1.0), "plain": nn.Embedding(9, 4)})
    with pytest.warns(UserWarning, match="2 of the targets were left"):
        report = fastlora.patch(model, target_modules=["odd", "bounded", "plain"])
    assert report.patched == ["plain"]
    assert "behaviour of its own" in report.left_alone["odd"] and "max_norm" in report.left_alone["bounded"]
    kinds: tuple[dict[str, Any], ...] = ({"use_dora": True}, {"use_adalora": True})
    for kind in kinds:
        with pytest.raises(
            ValueError, match=f"'model.embed_tokens' cannot be patched: .*plain LoRA only, not {next(iter(kind))}"
        ):
            fastlora.patch(tiny_model("llama"), target_modules=TARGETS, strict=True, **kind)
    odd: Any = tiny_model("llama")
    parametrize.register_parametrization(odd.model.embed_tokens, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"cannot be patched: ParametrizedEmbedding is a subclass of nn.Embedding"):
        fastlora.patch(odd, target_modules=TARGETS, strict=True)


def test_all_linear_and_starts_from_gradients_leave_it_alone():
    assert "model.embed_tokens" not in fastlora.patch(tiny_model("llama")).patched
    model = patched()
    with torch.no_grad():
        model.model.embed_tokens.lora_embedding_A["default"].zero_()
    b = model.model.embed_tokens.lora_embedding_B["default"].detach().clone()
    with pytest.warns(UserWarning, match=r"model\.embed_tokens: only linear layers are sketched"):
        sketch = fastlora.GradientSketch(model, r=4, target_modules=TARGETS)
    with sketch:
        model(**BATCH).loss.backward()
    assert list(sketch.names) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    fastlora.init_lora_ga(model, sketch, norm_clip=0.5)
    layer = model.model.embed_tokens
    assert not layer.lora_embedding_A["default"].any() and torch.equal(layer.lora_embedding_B["default"], b)
    assert "torch" in repr(fastlora.explain(layer, IDS)) and fastlora.fallbacks(model) == {}
    fastlora.merge(model)
    assert fastlora.explain(layer, IDS).forward == "base"
    fastlora.unmerge(model)
    groups = {g["name"]: g for g in fastlora.optim.lora_plus_param_groups(model, lr=1e-4, embedding_lr=3e-6)}
    held = {id(parameter) for parameter in groups["lora_embedding"]["params"]}
    assert held == {id(p) for p in layer.trained_parameters("default")} and groups["lora_embedding"]["lr"] == 3e-6


def test_files_and_vocabularies_that_do_not_fit(tmp_path):
    model: Any = tiny_model("llama")
    fastlora.patch(model, r=4, target_modules=TARGETS)
    with pytest.warns(UserWarning, match=r"not moved from its start in 3 of 3 layers: .*embed_tokens"):
        fastlora.save_adapter(model, tmp_path)
    moved(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.save_adapter(model, tmp_path)
    larger: Any = tiny_model("llama")
    larger.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=r"lora_A of 'model.embed_tokens': got shape \(4, 61\), want \(4, 70\)"):
        fastlora.load_adapter(larger, tmp_path)
    fastlora.patch(larger, r=4, target_modules=TARGETS)
    assert larger(torch.tensor([[65]])).logits.shape == (1, 1, 70)
    other: Any = tiny_model("llama")
    other.model.embed_tokens = nn.Linear(61, 24)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens': the file has it as an embedding, and it is a linear"):
        fastlora.load_adapter(other, tmp_path)

    model.resize_token_embeddings(70)
    for call in (lambda: model(IDS), lambda: fastlora.save_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="resize"):
            call()
