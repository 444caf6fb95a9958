"""Larger pieces than a layer, all contenders in turns: `python -m bench suite` (docs/benchmarks.md).

Groups of layers that share x, gated MLPs, batches of several adapters, whole transformer blocks at real shapes, a
training step of a small language model; and, when asked for, DoRA and a mixture's experts.
Prints a short table per case and writes everything as JSON, as lora_linear does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..harness.counting import Problem
from ..harness.runner import DTYPES, new_parser, run, some_of
from ..harness.turns import Case
from ..layers import dora, experts, forms, mixed
from . import blocks


@dataclass(frozen=True)
class Sizes:
    """What is measured on one sort of device."""

    groups: str  # a key of forms.GROUPS, forms.MLPS and mixed.BATCHES
    blocks: tuple[str, ...]
    sequences: int
    tokens: int
    model: str
    model_sequences: int
    model_tokens: int
    dtypes: tuple[str, ...]
    dropouts: tuple[float, ...]
    rounds: int


SIZES = {
    "cuda": Sizes(
        "cuda", ("llama-3-8b", "qwen3-8b", "mistral-7b", "t5-base", "vit-l"), 4, 2048, "llama-400m", 4, 1024,
        ("bf16", "mixed"), (0.0, 0.1), 20,
    ),
    "cpu": Sizes(
        "cpu", ("llama-3-8b", "qwen3-8b", "mistral-7b", "t5-base", "vit-l"), 1, 128, "llama-small", 2, 128,
        ("mixed",), (0.0,), 8,
    ),
    "tiny": Sizes("tiny", ("tiny",), 2, 16, "llama-tiny", 2, 16, ("fp32",), (0.0, 0.1), 2),
}  # fmt: skip
FORMS = ("group", "mlp", "mixed", "block", "train", "dora", "experts")  # the last two only when asked for


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Callable[[], Case]]:
    """What makes each case, the most telling ones first: a run may be cut short."""
    sizes: Sizes = options.sizes
    for kind in options.dtype:
        dtype, adapter_dtype = DTYPES[kind]
        for p in options.dropout:
            for form in options.forms:
                if form == "group":
                    for name, (m, k, ns) in forms.GROUPS[sizes.groups].items():
                        group = forms.Group(m, k, ns, options.r, dtype, adapter_dtype, p)
                        yield lambda name=name, group=group: forms.group_case(name, group, device)
                elif form == "mlp":
                    like = Problem(0, 0, 0, options.r, dtype, adapter_dtype, dropout=p)
                    yield lambda like=like: forms.mlp_case(*forms.MLPS[sizes.groups], like, device)
                elif form == "mixed":
                    like = Problem(0, 0, 0, options.r, dtype, adapter_dtype, dropout=p)
                    for batch in mixed.BATCHES[sizes.groups]:
                        yield lambda batch=batch, like=like: mixed.mixed_case(batch, like, device)
                elif form == "block":
                    for name in options.models or sizes.blocks:
                        amount = blocks.sequences_of(name, sizes.sequences, sizes.tokens)
                        settings = blocks.Settings(*amount, options.r, p, dtype, adapter_dtype)
                        yield lambda name=name, settings=settings: blocks.block_case(name, settings, device, 2)
                elif form == "dora":
                    for m, n, k in dora.SHAPES[sizes.groups]:
                        problem = Problem(m, n, k, options.r, dtype, adapter_dtype, dropout=p)
                        yield lambda problem=problem: dora.dora_case(problem, device)
                elif form == "experts" and p == 0.0:  # PEFT has no dropout there
                    like = Problem(0, 0, 0, options.r, dtype, adapter_dtype)
                    for mixture in experts.MIXTURES[sizes.groups]:
                        yield lambda mixture=mixture, like=like: experts.experts_case(mixture, like, device)
                elif form == "train":
                    amount = (sizes.model_sequences, sizes.model_tokens)
                    settings = blocks.Settings(*amount, options.r, p, dtype, adapter_dtype)
                    yield lambda settings=settings: blocks.training_case(sizes.model, settings, device, 2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("suite", __doc__)
    parser.add_argument("--size", choices=SIZES, help="(default: the device's)")
    parser.add_argument("--forms", default=",".join(FORMS[:-2]), help="comma-separated, of: " + ", ".join(FORMS))
    parser.add_argument("--models", help="blocks, comma-separated, of: " + ", ".join(blocks.BLOCKS))
    options = parser.parse_args(arguments)
    options.sizes = SIZES[options.size or options.device.partition(":")[0]]
    options.forms = some_of(parser, "--forms", options.forms, FORMS)
    options.models = some_of(parser, "--models", options.models, list(blocks.BLOCKS))
    options.names = options.contenders.split(",") if options.contenders else None
    plain = {"cuda": ["bf16"]}.get(options.device.partition(":")[0], ["fp32"])
    options.dtype = options.dtype or (plain if options.forms == ["experts"] else list(options.sizes.dtypes))
    options.dropout = options.dropout or list(options.sizes.dropouts)
    options.rounds = options.rounds or options.sizes.rounds
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    name = options.forms[0] if len(options.forms) == 1 else "suite"
    return run(name, list(cases(options, torch.device(options.device))), options.names, options)
