"""Random stand-ins, in a Hugging Face cache, for the models and adapters that PEFT's tests download."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

CAUSAL, SEQ2SEQ, BARE = "ForCausalLM", "ForConditionalGeneration", "Model"
SIZES = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 512}
GPT2_LIKE = {"vocab_size": 1024, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
OPT_LIKE = {**SIZES, "ffn_dim": 37, "max_position_embeddings": 512, "word_embed_proj_dim": 16}
T5_LIKE = {"vocab_size": 1024, "d_model": 16, "d_kv": 4, "d_ff": 37, "num_layers": 2, "num_heads": 4}
MOE = {**LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
LLAMA4 = {**MOE, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "pad_token_id": 2}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# family, class and configuration
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "google/flan-t5-small": ("T5", SEQ2SEQ, T5_LIKE),
    "gpt2": ("GPT2", "LMHeadModel", GPT2_LIKE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3Text",
        "",
        {**LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", CAUSAL, LLAMA_LIKE),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral", CAUSAL, {**LLAMA_LIKE, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2", "LMHeadModel", GPT2_LIKE),
    "peft-internal-testing/gpt2-lora-random": ("GPT2", "LMHeadModel", GPT2_LIKE),
    # As many layers as the real one: a test counts them.
    "peft-internal-testing/opt-125m": ("OPT", CAUSAL, {**OPT_LIKE, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", CAUSAL, {**LLAMA_LIKE, "num_key_value_heads": 2}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "Bart",
        SEQ2SEQ,
        {"vocab_size": 1024, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 512},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("Bert", BARE, {**SIZES, "intermediate_size": 37}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "Bloom",
        CAUSAL,
        {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2", "LMHeadModel", GPT2_LIKE),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ", CAUSAL, {**GPT2_LIKE, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoX", CAUSAL, {**SIZES, "intermediate_size": 37}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", CAUSAL, LLAMA_LIKE),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT", CAUSAL, OPT_LIKE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5", SEQ2SEQ, T5_LIKE),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2", "LMHeadModel", GPT2_LIKE),
    "peft-internal-testing/tiny-random-t5": ("T5", SEQ2SEQ, T5_LIKE),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOss", CAUSAL, MOE),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4Text", "", LLAMA4),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", CAUSAL, LLAMA_LIKE),
}
ADAPTERS = {"peft-internal-testing/tiny-OPTForCausalLM-lora": "peft-internal-testing/tiny-random-OPTForCausalLM"}
REVISION = "0" * 40


def ensure(parent: Path) -> Path:
    """A folder for HF_HOME that holds MODELS and ADAPTERS; made once for each version of this file."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = parent / f"fastlora-peft-suite-models-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            for name in MODELS:
                _write(Path(partial), name, _model(name))
            for name, base in ADAPTERS.items():
                model = _model(base)
                model.name_or_path = base
                _write(Path(partial), name, get_peft_model(model, LoraConfig(init_lora_weights=False)))
            shutil.copytree(partial, f"{folder}.partial", dirs_exist_ok=True)
        Path(f"{folder}.partial").rename(folder)
    return folder


def _model(name: str) -> Any:
    family, kind, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SPECIAL, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if not kind:  # the configuration is a part of the family's, which has no class of its own
            return transformers.AutoModelForCausalLM.from_config(config)
        return getattr(transformers, family + kind)(config)


def _write(home: Path, name: str, model: Any) -> None:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    model.save_pretrained(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
