"""One LoRA linear layer, all contenders in turns: `python -m bench lora_linear` (docs/benchmarks.md).

Prints a short table per case and writes everything as JSON: medians and 20th/80th percentiles of forward and of
forward + backward, the ratio to the frozen layer and to eager PyTorch, FLOPs, bytes, and the share of the roof that
was measured in the same run. "backward" is the difference of the two medians.
"""

from __future__ import annotations

import argparse
import functools

import torch

from ..harness import turns
from ..harness.contenders import CONTENDERS, Tensors, build
from ..harness.counting import Problem
from ..harness.runner import DTYPES, layer_case, new_parser, run, some_of
from ..harness.turns import Case

SHAPES = {  # (M, N, K): a Llama-3-8B block's linears on a GPU; what a CPU does in milliseconds elsewhere
    "cuda": [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (8192, 1024, 4096)],
    "cpu": [(512, 1024, 1024), (512, 4096, 1024), (512, 1024, 4096)],
    "peers": [(m, n, n) for n in (4096, 5120, 8192) for m in (2048, 4096, 8192)],  # as the peers' papers measure
    "tiny": [(64, 48, 32)],
}


def contender_names(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return list(CONTENDERS)
    return ["frozen", "eager", "peft", "addmm", "torch"]


def linear_case(problem: Problem, device: torch.device) -> Case:
    tensors = Tensors.random(problem, device)
    inputs = tensors.inputs(rotation(problem, device), device)
    builders = {name: functools.partial(build, name, tensors) for name in CONTENDERS}
    return layer_case(problem, inputs, builders, problem=problem)


def rotation(problem: Problem, device: torch.device) -> int:
    """How many different inputs make more than twice the L2."""
    return turns.rotation(problem.x + problem.y, device)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("lora_linear", __doc__)
    parser.add_argument("--shapes", choices=SHAPES, help="which set of shapes (default: the device's)")
    parser.add_argument(
        "--shape", action="append", metavar="MxNxK", help="one shape, such as 8192x4096x4096; may repeat"
    )
    parser.add_argument("--bias", action="store_true")
    options = parser.parse_args(arguments)
    names = some_of(parser, "--contenders", options.contenders, list(CONTENDERS))
    options.names = names or contender_names(torch.device(options.device))
    options.rounds = options.rounds or (30 if options.device.startswith("cuda") else 60)
    try:
        options.cases = cases(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def cases(options: argparse.Namespace) -> list[Problem]:
    shapes = SHAPES[options.shapes or options.device.partition(":")[0]]
    if options.shape:
        shapes = []
        for text in options.shape:
            parts = text.split("x")
            if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
                raise ValueError(f"--shape: got {text!r}, want MxNxK, such as 8192x4096x4096")
            shapes.append(tuple(map(int, parts)))
    if options.r < 1:
        raise ValueError(f"--r: got {options.r}, want at least 1")
    kinds = options.dtype or (["bf16"] if options.device.startswith("cuda") else list(DTYPES))
    return [
        Problem(m, n, k, options.r, *DTYPES[kind], bias=options.bias, dropout=p)
        for kind in kinds
        for p in options.dropout or [0.0, 0.1]
        for m, n, k in shapes
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    return run(
        "lora_linear", [functools.partial(linear_case, p, device) for p in options.cases], options.names, options
    )
