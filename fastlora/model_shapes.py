"""The linear layers of well-known transformers as (N, K), out and in features; or of any, from its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Shape = tuple[int, int]


def decoder(hidden: int, intermediate: int, key_value: int, query: int | None = None) -> tuple[Shape, ...]:
    """q, o; k, v; gate, up; down of a Llama-style block. query: the heads' width together, where it is not hidden."""
    query = query or hidden
    return _distinct(
        [(query, hidden), (hidden, query), (key_value, hidden), (intermediate, hidden), (hidden, intermediate)]
    )


def _distinct(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    return tuple(dict.fromkeys(shapes))


MODEL_SHAPES: dict[str, tuple[Shape, ...]] = {
    "llama-2-7b": decoder(4096, 11008, 4096),
    "llama-3-8b": decoder(4096, 14336, 1024),
    "mistral-7b": decoder(4096, 14336, 1024),
    "qwen3-8b": decoder(4096, 12288, 1024),
    "t5-base": decoder(768, 3072, 768),
    "vit-l": decoder(1024, 4096, 1024),
}

# The names that configurations give to the same thing, the commonest first.
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
_INTERMEDIATE = ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim")
# Models that compute several projections in one layer, whose width no setting names.
_FUSED_QKV = ("gpt2", "gpt_neox", "phi3")
_FUSED_GATE = ("phi3",)


def from_config(path: Path | str) -> tuple[Shape, ...]:
    """The distinct (N, K) of a transformers model's block, from its `config.json` or the directory that it is in.

    Raises ValueError where the file is no such configuration, or lacks what the shapes follow from. Separate q, k, v
    (and gate, up) are assumed except in models known to fuse them; of mixtures of experts it tells one expert.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: want a transformers config.json or its directory: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got a {type(config).__name__}, want the settings of a model")
    return shapes_of(config.get("text_config") or config, str(path))


def shapes_of(config: dict[str, Any], where: str = "config") -> tuple[Shape, ...]:
    """As `from_config`, from the settings themselves."""
    hidden, heads = _setting(config, _HIDDEN, where), _setting(config, _HEADS, where)
    kind = config.get("model_type")
    default = 4 * hidden if kind == "gpt2" else None
    intermediate = _setting(config, _INTERMEDIATE, where, default)
    head_dim = config.get("head_dim") or config.get("d_kv") or hidden // heads
    query = heads * head_dim
    key_value = (config.get("num_key_value_heads") or heads) * head_dim
    attention: list[Shape] = [(query, hidden), (hidden, query), (key_value, hidden)]
    if kind in _FUSED_QKV:
        attention = [(query + 2 * key_value, hidden), (hidden, query)]
    up = 2 * intermediate if kind in _FUSED_GATE else intermediate
    return _distinct([*attention, (up, hidden), (hidden, intermediate)])


def _setting(config: dict[str, Any], names: tuple[str, ...], where: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is not None:
        return default
    raise ValueError(f"{where}: got none of {', '.join(names)}, want one as a positive integer")
