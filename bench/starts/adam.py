"""How near Adam's first step on an adapter comes to full Adam's, sign(G), by its start: `python -m bench adam_start`.

On the gradients of bench/starts/lora_ga.py. The measure is fastlora/init/sign.py's: the share of ‖sign(G)‖² that the
step misses with the best learning rate; 0 is full fine-tuning, 1 is nothing.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from fastlora import linalg
from fastlora.init.factors import SPLITS, split_factors
from fastlora.init.sign import Signs, leading_factors, minimise, objective

from .lora_ga import Task, docstring_task, full_gradients


def missed(task: Task, r: int) -> dict[str, list[float]]:
    """Start -> the share that is missed, layer by layer."""
    torch.manual_seed(0)
    shares: dict[str, list[float]] = {}
    for gradient in full_gradients(task).values():
        signs = Signs(gradient)
        n, m = gradient.shape
        starts = {"ordinary LoRA": (torch.randn(r, m), torch.zeros(n, r))}
        for name, matrix in (("G", gradient), ("sign(G)", signs)):
            u, _, vh, _ = linalg.truncated_svd(matrix, 2 * r)
            starts |= {f"{name}, {split}": split_factors(u, vh, r, split) for split in SPLITS}
        starts["sign(G), the same r triplets on both sides"] = leading_factors(signs, r, 0)
        for name, (a, b) in starts.items():
            shares.setdefault(name, []).append(objective(gradient, signs, a, b))
        found = minimise(gradient, signs, *leading_factors(signs, r, 0))
        shares.setdefault("minimised from there", []).append(found.objective)
        shares.setdefault("(rounds)", []).append(found.rounds)
    return shares


def main(arguments: list[str] | None = None) -> int:
    """Prints the median and the worst layer of every start."""
    parser = argparse.ArgumentParser(prog="python -m bench adam_start", description=__doc__)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)
    task = docstring_task(options.micro_batches, options.batch_size)
    print(f"{'start':<46}{'median':>9}{'worst':>9}")
    for name, values in missed(task, options.r).items():
        print(f"{name:<46}{statistics.median(values):>9.4f}{max(values):>9.4f}")
    return 0
