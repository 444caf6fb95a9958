"""Random transformers models of a few thousand parameters, with a batch for each."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

ARCHITECTURES = ("llama", "qwen3", "gpt2", "bert", "bert-classifier", "t5", "vit")
_VOCABULARY = 61


def tiny_model(architecture: str, *, hidden_dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A model with random weights, in eval mode; `hidden_dropout` is the dropout of its own layers."""
    model, config, sizes, dropouts = _MODELS[architecture]
    settings = sizes | dict.fromkeys(dropouts, hidden_dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def tiny_batch(architecture: str) -> dict[str, Tensor]:
    """Keyword arguments for the model, labels included: calling it gives an output with `loss` and `logits`."""
    generator = torch.Generator().manual_seed(1)
    if architecture == "vit":
        images = torch.randn(3, 3, 16, 16, generator=generator)
        return {"pixel_values": images, "labels": torch.tensor([0, 2, 1])}
    tokens = torch.randint(3, _VOCABULARY, (2, 11), generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if architecture == "bert-classifier":
        return batch | {"labels": torch.tensor([1, 0])}
    return batch | {"labels": torch.randint(3, _VOCABULARY, (2, 11), generator=generator)}


_ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
}
_TOKENS = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
_DECODER = _ENCODER | _TOKENS | {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1}
_GPT2 = {"n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "attn_implementation": "eager", "bos_token_id": 1}
_T5 = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
_BERT = _ENCODER | {"vocab_size": _VOCABULARY, "max_position_embeddings": 64}
_IN_ENCODERS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
# By architecture: transformers' names of the model and its configuration, the sizes, and the settings of dropout.
_MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, ("attention_dropout",)),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _DECODER | {"head_dim": 6, "tie_word_embeddings": True},
        ("attention_dropout",),
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _TOKENS | _GPT2, ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT, _IN_ENCODERS),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _BERT, _IN_ENCODERS),
    "t5": ("T5ForConditionalGeneration", "T5Config", _TOKENS | _T5 | {"decoder_start_token_id": 0}, ("dropout_rate",)),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        _ENCODER | {"image_size": 16, "patch_size": 8, "num_labels": 3},
        _IN_ENCODERS,
    ),
}
