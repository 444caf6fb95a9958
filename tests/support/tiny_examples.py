"""What the examples' tests run on: a small encoder on disk, a small 'standard library', the digits."""

from pathlib import Path
from typing import Any

import torch


def save_tiny_encoder(directory: Path) -> Path:
    """A BERT of two small layers, with a WordPiece vocabulary of characters; returns its directory."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    characters = "abcdefghijklmnopqrstuvwxyz0123456789."
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    return directory


def write_library(root: Path, modules: int = 3, functions: int = 40) -> Path:
    """A small 'standard library' whose docstrings give their module away."""
    for module in range(modules):
        body = [f'"""Module number {module} of the library."""']
        body += [f'def f{i}():\n    """Topic {"abc"[module] * 4} case {i} of it."""' for i in range(functions)]
        (root / f"module{module}.py").write_text("\n".join(body))
    return root


def write_functions(root: Path, modules: int = 20, functions: int = 3) -> Path:
    """A small 'standard library' of documented functions, one of them the same in every module."""
    root.mkdir(exist_ok=True)
    for module in range(modules):
        body = ['def same(x):\n    """The same function everywhere, kept once."""\n    return x']
        body += [
            f'def f{i}(x, n=1):\n    """Add number {i} of module{module}"""\n    return x + n * {1000 * i + module}'
            for i in range(functions)
        ]
        (root / f"module{module}.py").write_text("\n".join(body))
    return root


def digits_task(out: Path, *options: str) -> Any:
    """The comparison's task on scikit-learn's digits, with its model pretrained under `out` (a second or two)."""
    from study.settings import parse_comparison
    from study.tasks.task import load_task

    arguments = ["--task", "digits", "--device", "cpu", "--out", str(out), *options]
    return load_task(parse_comparison(arguments), torch.device("cpu"))


def save_tiny_language_model(directory: Path, hidden: int = 32) -> Path:
    """A Llama of two small layers with a token per byte; returns its directory. bitsandbytes' CPU kernels are right for
    widths that are multiples of 64.
    """
    from study.data.language_models import SHAPE, byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    byte_tokenizer().save_pretrained(directory)
    torch.manual_seed(0)
    small = {"vocab_size": 260, "hidden_size": hidden, "intermediate_size": 3 * hidden // 2, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **small, **heads}, initializer_range=0.2)).save_pretrained(directory)
    return directory
