"""The counted memory of a training step, next to what torch's allocator was asked for."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastlora
from fastlora import doctor
from fastlora.introspect import shapes

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SIZES |= {"num_hidden_layers": 3, "vocab_size": 2000}


def measured(bits: int, checkpointing: bool) -> int:
    """What a model owns, and the most that its second step takes beyond that."""
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.to(torch.float32 if bits == 32 else torch.bfloat16)
    fastlora.patch(model, r=16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 2000, (1, 1024))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    owned = sum(t.numel() * t.element_size() for t in (*model.parameters(), *state, *gradients))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    kineto: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    held = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return owned + max(accumulate(held))


@pytest.mark.parametrize("bits, checkpointing", [(32, False), (16, False), (16, True)])
def test_counted_memory_is_near_what_a_step_takes(bits, checkpointing):
    counted = shapes.training_memory(SIZES, 1024, 16, bits, checkpointing).total
    assert counted == pytest.approx(measured(bits, checkpointing), rel=0.15)


def test_a_fused_loss_makes_a_chunk_of_logits_at_most():
    config = shapes.MODELS["llama-3-8b"]
    whole, fused = (shapes.training_memory(config, 8192, fused_loss=fused) for fused in (False, True))
    assert fused.temporary == 2**29 < whole.temporary and fused[:3] == whole[:3]


def test_weights_are_those_of_the_model():
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes.MODELS["llama-3-8b"]))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    weights = shapes.training_memory(shapes.MODELS["llama-3-8b"], 1).weights
    assert weights == 2 * (model.num_parameters() - norms)


CONFIGS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}, {(24, 24), (12, 24), (40, 24), (24, 40)}),
    "qwen3": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 8},
        {(32, 24), (24, 32), (16, 24), (40, 24), (24, 40)},
    ),
    "bert": ("BertConfig", {}, {(24, 24), (40, 24), (24, 40)}),
    "vit": ("ViTConfig", {}, {(24, 24), (40, 24), (24, 40)}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "pad_token_id": 0}, {(48, 24), (24, 24), (80, 24), (24, 40)}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_from_the_configurations_that_transformers_writes(name, tmp_path):
    kind, more, wanted = CONFIGS[name]
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 1} | more
    getattr(transformers, kind)(**sizes).save_pretrained(tmp_path)
    assert set(shapes.from_config(tmp_path)) == wanted == set(shapes.from_config(tmp_path / "config.json"))


def test_other_names_for_the_same_things(tmp_path):
    t5 = {"model_type": "t5", "d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072}
    assert set(shapes.shapes_of(t5)) == set(shapes.MODEL_SHAPES["t5-base"])
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_inner": None}
    assert set(shapes.shapes_of(gpt2)) == {(2304, 768), (768, 768), (3072, 768), (768, 3072)}
    llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    assert set(shapes.shapes_of(llama)) == set(shapes.MODEL_SHAPES["llama-3-8b"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": llama}))
    assert shapes.from_config(tmp_path) == shapes.shapes_of(llama)
    with pytest.raises(ValueError, match=r"got none of num_attention_heads, num_heads.*want one as a positive integer"):
        shapes.shapes_of({"hidden_size": 64})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="got a list"):
        shapes.from_config(tmp_path)


def test_the_page_has_what_is_counted():
    page = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for name, config in shapes.MODELS.items():
        if "vocab_size" in config:
            ways: tuple[Any, ...] = ((16,), (16, True), (16, True, True), (4, True, True))
            cells = [f"{shapes.training_memory(config, 4096, 16, *way).total / 2**30:.1f}" for way in ways]
            assert f"| {name} | {' | '.join(cells)} |" in page


def test_the_command(tmp_path, capsys):
    assert doctor.main(["--memory", "qwen3-0.6b", "--tokens", "2048"]) == 0
    by_name = capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(shapes.MODELS["qwen3-0.6b"]))
    assert doctor.main(["--memory", str(tmp_path), "--tokens", "2048"]) == 0
    assert by_name.splitlines()[1:] == capsys.readouterr().out.splitlines()[1:] and len(by_name.splitlines()) == 10
    with pytest.raises(SystemExit):
        doctor.main(["--memory", "no-such-model"])
    assert "--memory: got 'no-such-model', want one of qwen3-0.6b" in capsys.readouterr().err
