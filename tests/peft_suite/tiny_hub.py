"""Random stand-ins, in a Hugging Face cache, for the tiny models that PEFT's decoder tests download."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
import transformers

SIZES = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 512}
GPT2_LIKE = {"vocab_size": 1024, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPT",
        {**SIZES, "ffn_dim": 37, "max_position_embeddings": 512, "word_embed_proj_dim": 16},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2", GPT2_LIKE),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2", GPT2_LIKE),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ", {**GPT2_LIKE, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", LLAMA_LIKE),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral", {**LLAMA_LIKE, "num_key_value_heads": 2}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", {**LLAMA_LIKE, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3Text",
        {**LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 8},
    ),
}
REVISION = "0" * 40


def ensure(folder: Path) -> Path:
    """A folder for HF_HOME that holds MODELS; made once."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            for name, (family, settings) in MODELS.items():
                _write(Path(partial), name, family, settings)
            shutil.copytree(partial, f"{folder}.partial", dirs_exist_ok=True)
        Path(f"{folder}.partial").rename(folder)
    return folder


def _write(home: Path, name: str, family: str, settings: dict) -> None:
    config = getattr(transformers, f"{family}Config")(**settings, **SPECIAL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    model.save_pretrained(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
