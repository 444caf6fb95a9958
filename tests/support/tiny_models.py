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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[architecture](hidden_dropout).eval()


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


def _decoder_sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _config(kind: Any, **settings: Any) -> Any:
    return kind(**settings)  # settings that transformers' configurations take beyond those they declare


def _llama(dropout: float) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder_sizes(attention_dropout=dropout)))


def _qwen3(dropout: float) -> nn.Module:
    sizes = _decoder_sizes(attention_dropout=dropout, head_dim=6, tie_word_embeddings=True)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))


def _gpt2(dropout: float) -> nn.Module:
    config = _config(
        transformers.GPT2Config,
        vocab_size=_VOCABULARY,
        n_positions=64,
        n_embd=24,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _bert_config(dropout: float) -> Any:
    return _config(
        transformers.BertConfig,
        vocab_size=_VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )


def _bert(dropout: float) -> nn.Module:
    return transformers.BertForMaskedLM(_bert_config(dropout))


def _bert_classifier(dropout: float) -> nn.Module:
    return transformers.BertForSequenceClassification(_bert_config(dropout))


def _t5(dropout: float) -> nn.Module:
    config = _config(
        transformers.T5Config,
        vocab_size=_VOCABULARY,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit(dropout: float) -> nn.Module:
    config = _config(
        transformers.ViTConfig,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )
    return transformers.ViTForImageClassification(config)


_BUILDERS = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "bert": _bert,
    "bert-classifier": _bert_classifier,
    "t5": _t5,
    "vit": _vit,
}
