"""What the settings in a model's `config.json` say of its size: the shapes of its linear layers, and the memory that
training LoRA on it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

Shape = tuple[int, int]


def _decoder(
    hidden: int, intermediate: int, heads: int, key_value_heads: int, layers: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": key_value_heads, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return sizes | more


MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _decoder(1024, 3072, 16, 8, 28, 151936, head_dim=128, tie_word_embeddings=True),
    "llama-3.2-1b": _decoder(2048, 8192, 32, 8, 16, 128256, tie_word_embeddings=True),
    "llama-3.2-3b": _decoder(3072, 8192, 24, 8, 28, 128256, tie_word_embeddings=True),
    "llama-2-7b": _decoder(4096, 11008, 32, 32, 32, 32000),
    "mistral-7b": _decoder(4096, 14336, 32, 8, 32, 32000),
    "llama-3-8b": _decoder(4096, 14336, 32, 8, 32, 128256),
    "qwen3-8b": _decoder(4096, 12288, 32, 8, 36, 151936),
    "qwen3-14b": _decoder(5120, 17408, 40, 8, 40, 151936),
    "qwen3-32b": _decoder(5120, 25600, 64, 8, 64, 151936, head_dim=128),
    "llama-3-70b": _decoder(8192, 28672, 64, 8, 80, 128256),
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "d_kv": 64},
    "vit-l": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
}

# The names that configurations give to the same thing, the commonest first.
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
_INTERMEDIATE = ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
# Models that compute several projections in one layer, whose width no setting names.
_FUSED_QKV = ("gpt2", "gpt_neox", "phi3")
_FUSED_GATE = ("phi3",)


def from_config(path: Path | str) -> tuple[Shape, ...]:
    """The distinct (N, K) of a transformers model's block, from its `config.json` or the directory that it is in.

    Raises ValueError where the file is no such configuration, or lacks what the shapes follow from. Separate q, k, v
    (and gate, up) are assumed except in models known to fuse them; of mixtures of experts it tells one expert.
    """
    return shapes_of(read_config(path), str(path))


def read_config(path: Path | str) -> dict[str, Any]:
    """The settings of a language model, from its `config.json` or the directory that it is in."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: want a transformers config.json or its directory: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got a {type(config).__name__}, want the settings of a model")
    return config.get("text_config") or config


def shapes_of(config: dict[str, Any], where: str = "config") -> tuple[Shape, ...]:
    """As `from_config`, from the settings themselves."""
    hidden, query, key_value, intermediate = _widths(config, where)
    kind = config.get("model_type")
    attention: list[Shape] = [(query, hidden), (hidden, query), (key_value, hidden)]
    if kind in _FUSED_QKV:
        attention = [(query + 2 * key_value, hidden), (hidden, query)]
    up = 2 * intermediate if kind in _FUSED_GATE else intermediate
    return tuple(dict.fromkeys([*attention, (up, hidden), (hidden, intermediate)]))


def _widths(config: dict[str, Any], where: str) -> tuple[int, int, int, int]:
    """Of the residual stream, of all query heads, of all key heads, of the MLP."""
    hidden, heads = _setting(config, _HIDDEN, where), _setting(config, _HEADS, where)
    default = 4 * hidden if config.get("model_type") == "gpt2" else None
    head_dim = config.get("head_dim") or config.get("d_kv") or hidden // heads
    key_value = (config.get("num_key_value_heads") or heads) * head_dim
    return hidden, heads * head_dim, key_value, _setting(config, _INTERMEDIATE, where, default)


def _setting(config: dict[str, Any], names: tuple[str, ...], where: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    if default is not None:
        return default
    raise ValueError(f"{where}: got none of {', '.join(names)}, want one as a positive integer")


MODEL_SHAPES = {name: shapes_of(config) for name, config in MODELS.items()}


class Memory(NamedTuple):
    """Bytes of a training step: what is there all the time, what the forward pass keeps, what comes and goes."""

    weights: float
    adapters: float  # float32, with gradients and AdamW's two moments
    activations: float
    temporary: float  # the logits; with checkpointing one block, where that is larger

    @property
    def total(self) -> float:
        return sum(self)


def training_memory(
    config: dict[str, Any],
    tokens: int,
    r: int = 16,
    bits: int = 16,
    checkpointing: bool = False,
    fused_loss: bool = False,
    where: str = "config",
) -> Memory:
    """Counts, for a Llama-style decoder with float32 LoRA on all linear layers but the head, without dropout.

    tokens: batch size times length. bits: of the frozen linear layers, 32, 16 or 4 (NF4, doubly quantised); all else
    is in float32 for 32, else in 16 bits. checkpointing: every block keeps its input alone. fused_loss: no logits
    beyond a chunk of them. Left out: what the allocator and CUDA itself hold, and temporaries smaller than the logits.
    """
    hidden, query, key_value, intermediate = _widths(config, where)
    layers, words = _setting(config, _LAYERS, where), _setting(config, ("vocab_size",), where)
    size = 4 if bits == 32 else 2
    pairs = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
    pairs += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    stored = {32: 4, 16: 2, 4: 0.5 + 1 / 64}[bits]
    embeddings = words * hidden * (1 if config.get("tie_word_embeddings") else 2) * size
    weights = embeddings + layers * sum(n * k for n, k in pairs) * stored
    adapters = layers * r * sum(n + k for n, k in pairs) * 4 * 4
    # Inputs of the linear layers, queries, keys and values, gate, up and their product; norms in float32; S.
    block = size * (2 * hidden + 2 * query + 2 * key_value + 4 * intermediate) + 8 * hidden + 4 * r * len(pairs)
    logits = tokens * words * (size + 8)  # themselves, log-probabilities and their gradient, these two in float32
    logits = min(logits, 2**29) if fused_loss else logits
    if checkpointing:  # the logits are gone when a block is computed again
        return Memory(weights, adapters, tokens * layers * size * hidden, max(logits, tokens * block))
    return Memory(weights, adapters, tokens * layers * block, logits)
