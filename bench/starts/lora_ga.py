"""How well LoRA-GA's ways of starting are aligned with the gradient, and what they cost: `python -m bench lora_ga`.

On the gradients of MiniLM-L6, or with --model smollm2 of SmolLM2-135M, for their tasks (examples/): every linear layer
but a language model's head. Seconds are the processor's, beyond the backward passes of the frozen model. The peak is
what the process occupies at most above what it did before, passes included, in a second run of each. The error is
what one step of SGD leaves of the gradient, ‖G − c·(B Bᵀ G + G Aᵀ A)‖²/‖G‖² with the best step size c, over what the
best update of rank 2r leaves (Eckart and Young): 1 is perfect. With --shapes: bench/starts/shapes.py.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.init.factors import split_factors
from fastlora.linalg import orthonormal

from ..harness import machine
from ..harness.turns import write_json
from . import shapes

Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Task:
    """A model with its micro-batches and its loss of one; `encoder` is the part that adapters go into."""

    model: nn.Module
    batches: list[Any]
    loss: Callable[[Any, Any], Tensor]

    @property
    def encoder(self) -> nn.Module:
        return getattr(self.model, "encoder", self.model)

    def passes(self) -> None:
        """A forward and a backward pass of each micro-batch; each counts the same."""
        for batch in self.batches:
            self.loss(self.model, batch).backward()


@dataclass
class Result:
    """`seconds` beyond the backward passes of the frozen model; `held` bytes that live until the factors are there;
    `peak` bytes above those of before, None where it was not measured."""

    seconds: float
    held: int
    peak: int | None = None
    errors: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """The median and the worst layer's error over the optimum."""
        return {"median": statistics.median(self.errors), "worst": max(self.errors)} if self.errors else {}


def docstring_task(micro_batches: int, batch_size: int, max_length: int = 64, model: str = "minilm") -> Task:
    """The task in examples/ of MiniLM or a language model. Raises FileNotFoundError where its weights are missing."""
    folder = str(machine.ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from study.settings import parse_fine_tuning
    from study.tasks.task import load_task

    name = "docstrings" if model == "minilm" else "language"
    sizes = ["--batch", str(batch_size), "--seq-len", str(max_length), "--dtype", "float32"]
    task = load_task(parse_fine_tuning(["--task", name, "--model", model, *sizes]), torch.device("cpu"))
    batches = [task.batch(indices) for indices in task.order(0, micro_batches)]
    return Task(task.fresh_model(0).eval().requires_grad_(False), batches, task.loss)


def linear_layers(task: Task) -> dict[str, nn.Linear]:
    head = getattr(task.encoder, "get_output_embeddings", lambda: None)()
    found = task.encoder.named_modules()
    return {name: module for name, module in found if isinstance(module, nn.Linear) and module is not head}


def full_gradients(task: Task) -> dict[str, Tensor]:
    """The gradients of every linear weight of the encoder, all at once, as the original code has them."""
    weights = {name: layer.weight for name, layer in linear_layers(task).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    task.passes()
    gradients: dict[str, Tensor] = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        gradients[name], weight.grad = weight.grad, None
        weight.requires_grad_(False)
    return gradients


def errors(gradients: dict[str, Tensor], factors: Factors, r: int) -> list[float]:
    """Per layer, what a step leaves of ‖G‖² over what the best one of rank 2r leaves."""
    out = []
    for name, gradient in gradients.items():
        g = gradient.double()
        a, b = (factor.double() for factor in factors[name])
        step = b @ (b.t() @ g) + (g @ a.t()) @ a
        step = step * ((step * g).sum() / step.square().sum())
        sigma_squared = torch.linalg.eigvalsh(g @ g.t() if g.shape[0] <= g.shape[1] else g.t() @ g)
        out.append(((g - step).square().sum() / sigma_squared[: -2 * r].sum()).item())
    return out


# The contenders: each gives factors, seconds and bytes.
def by_sketch(task: Task, r: int, width: int | None, refine: bool, frozen: float) -> tuple[Factors, Result]:
    sketch = fastlora.GradientSketch(task.encoder, r=r, width=width, weighting="equal")
    with stopwatch() as clock:
        with sketch:
            task.passes()
        if refine:
            with sketch.refine():
                task.passes()
        factors = {name: two_halves(*layer.svd(2 * r), r) for name, layer in sketch.layers.items()}
    held = sum(layer.nbytes for layer in sketch.layers.values())
    return factors, Result(clock() - frozen * (2 if refine else 1), held)


def by_svd_lowrank(task: Task, r: int, frozen: float) -> tuple[Factors, Result]:
    """torch.svd_lowrank of the full gradients, with the original code's settings."""
    with stopwatch() as clock:
        gradients = full_gradients(task)
        factors = {}
        for name, g in gradients.items():
            u, s, v = torch.svd_lowrank(g, q=min(4 * r, *g.shape), niter=4)
            factors[name] = two_halves(u, s, v.t(), r)
    return factors, Result(clock() - frozen, sum(4 * g.numel() for g in gradients.values()))


def by_two_sided_sketch(task: Task, r: int, width: int, frozen: float) -> tuple[Factors, Result]:
    """Y = G Ω and W = Ψ G in one pass (Tropp et al. 2017), `width` columns in all; simulated on the full gradient, so
    without a time of its own."""
    factors, held, k = {}, 0, width // 3
    for name, g in full_gradients(task).items():
        n, m = g.shape
        omega, psi = torch.randn(m, k), torch.randn(2 * k, n)
        q = orthonormal(g @ omega)
        z = torch.linalg.lstsq(psi @ q, psi @ g).solution
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        factors[name] = two_halves(q @ u, s, vh, r)
        held += 4 * (n * k + 2 * k * m)
    return factors, Result(float("nan"), held)


def by_peft(task: Task, r: int, frozen: float) -> tuple[Factors, Result]:
    """PEFT's LoRA-GA with its defaults, but for dropout, which it leaves on and which is set to 0 here. Raises
    ImportError where this PEFT has none."""
    import peft
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga  # type: ignore[attr-defined]

    task = copy.deepcopy(task)
    for module in task.encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = sorted({name.rpartition(".")[2] for name in linear_layers(task)})
    config = peft.LoraConfig(
        r=r, target_modules=names, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()  # type: ignore[arg-type]
    )  # fmt: skip
    held = sum(4 * layer.weight.numel() for layer in linear_layers(task).values())
    with stopwatch() as clock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_loraga(task.encoder, config, task.passes)  # type: ignore[arg-type]
        model: Any = peft.get_peft_model(task.encoder, config)  # type: ignore[arg-type]
    factors = {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach(),
            module.lora_B["default"].weight.detach(),
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    return factors, Result(clock() - frozen, held)


def ordinary_lora(task: Task, r: int) -> tuple[Factors, Result]:
    torch.manual_seed(0)
    factors = {
        name: (torch.randn(r, layer.in_features), torch.zeros(layer.out_features, r))
        for name, layer in linear_layers(task).items()
    }
    return factors, Result(0.0, 0)


def two_halves(u: Tensor, s: Tensor, vh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return split_factors(u[:, : 2 * r], vh[: 2 * r], r, "ArB2r")


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    start, stop = time.process_time(), []
    yield lambda: (stop[0] if stop else time.process_time()) - start
    stop.append(time.process_time())


def frozen_passes(task: Task) -> float:
    """Seconds of the passes with every weight frozen, and gradients only of activations: what training would do."""
    embeddings: Any = task.encoder.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        task.passes()  # warm
        with stopwatch() as clock:
            task.passes()
    finally:
        handle.remove()
    return clock()


def measure(task: Task, r: int, widths: list[int | None]) -> dict[str, Result]:
    """Every contender's result, by name."""
    gradients, frozen = full_gradients(task), frozen_passes(task)
    default = fastlora.GradientSketch(task.encoder, r=r).width
    contenders: dict[str, Callable[[], tuple[Factors, Result]]] = {}
    for width in widths:
        c = width or default
        for refine in (False, True):
            contenders[f"GradientSketch, c = {c}" + (", refined" if refine else "")] = (
                lambda width=width, refine=refine: by_sketch(task, r, width, refine, frozen)
            )
    contenders |= {
        f"two-sided sketch, c = {default}": lambda: by_two_sided_sketch(task, r, default, frozen),
        "svd_lowrank of the full gradient": lambda: by_svd_lowrank(task, r, frozen),
        "PEFT's LoRA-GA": lambda: by_peft(task, r, frozen),
        "ordinary LoRA": lambda: ordinary_lora(task, r),
    }
    results = {"backward passes alone": Result(frozen, 0)}
    for name, run in contenders.items():
        try:
            factors, result = run()
        except ImportError as error:
            print(f"{name}: not measured: {error}")
            continue
        result.errors = errors(gradients, factors, r)
        results[name] = result
    del gradients, factors
    # Last, because memory can be seen only where malloc gives all of it back, which takes time.
    again: dict[str, Callable[[], object]] = {**contenders, "backward passes alone": lambda: frozen_passes(task)}
    for name, result in results.items():
        result.peak = peak_of(again[name]) if result.seconds > 0 else None
    return results


def peak_of(run: Callable[[], object]) -> int | None:
    """The most bytes that the process occupies while it runs, above those of before."""
    gc.collect()
    meter = shapes.Meter(torch.device("cpu"))
    before = meter.allocated()
    meter.start()
    run()
    meter.stop(before)
    return meter.result()["peak_bytes"]


def table(results: dict[str, Result]) -> str:
    rows = [("", "error / optimum: median", "worst", "s beyond backward", "MB held", "MB at the peak")]
    for name, result in results.items():
        median, worst = (f"{error:.4f}" for error in result.summary().values()) if result.errors else ("", "")
        peak = "" if result.peak is None else f"{result.peak / 1e6:.0f}"
        rows.append((name, median, worst, f"{result.seconds:.2f}", f"{result.held / 1e6:.1f}", peak))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench lora_ga", description=__doc__)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="*", help="columns of the sketch next to the default")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--model", default="minilm", help="minilm, smollm2, or another language model (a directory)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--shapes", choices=sorted(shapes.MODELS), help="synthetic gradients of these shapes")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, with --shapes")
    parser.add_argument("--layers", type=int, default=3, help="to compare with the peers, with --shapes")
    parser.add_argument("--whole", action="store_true", help="every layer of --shapes, next to the comparison")
    parser.add_argument("--device", default="cpu", help="with --shapes")
    parser.add_argument("--dtype", help="of X and dY, with --shapes; bfloat16 on a GPU, else float32")
    parser.add_argument("--out", help="a JSON file for the result")
    options = parser.parse_args(arguments)
    if options.shapes:
        dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
        width = max(6 * options.r, 32) if not options.widths else options.widths[0]
        settings = shapes.Settings(
            options.shapes, options.r, width, options.tokens, options.micro_batches, dtype, options.device
        )
        shapes.run(settings, options.layers, options.whole, options.out)
        return 0
    facts = machine.describe(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), flush=True)
    task = docstring_task(options.micro_batches, options.batch_size, options.max_length, options.model)
    tokens = sum(int(batch.attention_mask.sum()) for batch in task.batches)
    sizes = {"layers": len(linear_layers(task)), "micro-batches": len(task.batches), "tokens": tokens}
    print(", ".join(f"{count} {what}" for what, count in sizes.items()) + f", r = {options.r}", flush=True)
    results = measure(task, options.r, [None, *(options.widths or [])])
    print(table(results))
    if options.out:
        found = {name: asdict(result) | result.summary() for name, result in results.items()}
        settings = {"model": options.model, "r": options.r, **sizes}
        write_json(Path(options.out), {"machine": facts, "settings": settings, "results": found})
    return 0
