"""What the documentation's blocks run on in place of a download: a tiny random Llama and a tokenizer of characters."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ',' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant,{% endif %}"
)
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,."


def tiny_tokenizer(*_: Any, **__: Any) -> Any:
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=_TEMPLATE,
    )


def tiny_causal_lm(*_: Any, dtype: torch.dtype = torch.float32, quantization_config: Any = None, **__: Any) -> Any:
    """As `AutoModelForCausalLM.from_pretrained`, in 4 bits where that is asked for."""
    config = transformers.LlamaConfig(
        vocab_size=4 + len(_CHARACTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)  # whose own `to` is annotated beyond recognition
        if quantization_config is None:
            return model.to(dtype).eval()
        from quantised_models import quantise  # skips where bitsandbytes is missing

        return quantise(model.to(torch.bfloat16), 4, torch.bfloat16).eval()
