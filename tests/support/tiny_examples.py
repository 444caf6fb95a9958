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


def digits_task(out: Path, *options: str) -> Any:
    """The comparison's task on scikit-learn's digits, with its model pretrained under `out` (a second or two)."""
    from study.comparison import parse
    from study.tasks.task import load_task

    arguments = ["--task", "digits", "--device", "cpu", "--out", str(out), *options]
    return load_task(parse(arguments), torch.device("cpu"))
