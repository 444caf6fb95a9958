"""What GaLore's refreshes and steps cost, and how good the bases are: `python -m bench galore`.

A refresh of one weight's basis next to the full SVD and torch.svd_lowrank, on a synthetic gradient; one linear layer's
forward, backward and optimiser step next to torch.optim.AdamW, with the bytes of the states; with --bases what bases
hold of real gradients (bench/galore/bases.py); with --training what a small language model makes of it all
(bench/galore/training.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.linalg.operators import Rows
from fastlora.optim import GaLoreAdamW
from fastlora.optim.galore.projector import EXTRA_COLUMNS, Projector, State
from fastlora.runtime import messages

from ..harness import machine
from ..harness.runner import command, record_of
from ..harness.timing import Summary, timer_for
from ..harness.turns import write_json
from . import bases, training

OUT = machine.ROOT / "bench" / "results" / "cpu" / "galore.json"


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...]
    rank: int
    tokens: int
    rounds: int
    threads: int
    clock: str


@dataclass
class Line:
    """`seconds` is a median; `captured` the gradient's energy in the basis over that in the best one; `nbytes` the
    states'."""

    name: str
    seconds: float
    captured: float | None = None
    nbytes: int | None = None


def gradients(size: int) -> tuple[Tensor, Tensor]:
    """Two of a square weight that share half of their energy; singular values decay as (1 + i)^-0.8."""
    generator = torch.Generator().manual_seed(0)
    decay = (1.0 + torch.arange(size)) ** -0.4

    def draw() -> Tensor:
        left, right = (torch.randn(size, size, generator=generator) * decay for _ in range(2))
        return left @ right.t() / size

    shared, first, second = draw(), draw(), draw()
    return shared + first, shared + second


# Refreshes.
def refreshes(size: int, settings: Settings) -> list[Line]:
    """Each way to find a basis of the second gradient, from the first one's where it starts from something."""
    old, g = gradients(size)
    r, s = settings.rank, torch.linalg.svdvals(g.double())
    group: dict[str, Any] = {"rank": r, "proj_type": "left", "moments": "keep", "arithmetic": "torch"}
    projector = Projector.of(g, group)
    start: State = {}
    projector.start(start, 0, streamed=False)
    start["basis"] = torch.linalg.svd(old)[0][:, :r].contiguous()
    found: dict[str, Any] = {}

    def subspace(iterations: int) -> Callable[[], object]:
        def run() -> None:
            state = dict(start)
            projector.refresh(state, Rows(g), group | {"refresh": "subspace", "refresh_iterations": iterations}, 1)
            found[f"subspace, refresh_iterations={iterations}"] = state["basis"]

        return run

    def streamed() -> None:
        """One iteration, both halves of it."""
        state = start | {"halves": 2, "window": 1}
        options = group | {"refresh_steps": 1}
        projector.finish_step(state, options, low, [])
        projector.finish_step(state, options, low, projector.sums(state, Rows(g)))
        found["streamed, 1 iteration, besides R"] = state["basis"]

    def full_svd() -> None:
        found["full SVD"] = torch.linalg.svd(g, full_matrices=False)[0][:, :r]

    def lowrank(niter: int) -> Callable[[], object]:
        def run() -> None:
            found[f"svd_lowrank, niter={niter}"] = torch.svd_lowrank(g, q=r + EXTRA_COLUMNS, niter=niter)[0][:, :r]

        return run

    low = projector.project(start, Rows(g))
    ways: dict[str, Callable[[], object]] = {
        "full SVD": full_svd,
        "svd_lowrank, niter=2": lowrank(2),
        "subspace, refresh_iterations=2": subspace(2),
        "subspace, refresh_iterations=1": subspace(1),
        "streamed, 1 iteration, besides R": streamed,
        "R alone, in the old basis": lambda: projector.project(start, Rows(g)),
    }
    samples = timer_for(g.device, settings.clock).interleaved(ways, settings.rounds)
    found["R alone, in the old basis"] = start["basis"]
    best = s[:r].square().sum()
    return [
        Line(name, Summary.of(seconds).median, float((found[name].double().t() @ g.double()).square().sum() / best))
        for name, seconds in samples.items()
    ]


# Steps.
def training_step(size: int, tokens: int, build: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[Any, Any]:
    """A square layer's forward, backward and step, between refreshes; and its optimiser."""
    torch.manual_seed(0)
    layer = nn.Linear(size, size, bias=False)
    x = torch.randn(tokens, size, requires_grad=True)
    dy = torch.randn(tokens, size)
    optimizer = build(layer)

    def run() -> None:
        layer(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    for _ in range(3):  # a basis is there, and the moments
        run()
    return run, optimizer


def steps(size: int, settings: Settings) -> list[Line]:
    group = {"rank": settings.rank, "update_proj_gap": 10**9}

    def galore(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda layer: GaLoreAdamW([{"params": [*layer.parameters()], **group}], model=layer, **options)

    ways: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "torch.optim.AdamW": lambda layer: torch.optim.AdamW(layer.parameters()),
        "GaLore, plain": galore(),
        "GaLore, hook": galore(gradients="hook"),
        "GaLore, factored": galore(gradients="factored"),
        "GaLore, factored, 8 bits": galore(gradients="factored", optim_bits=8),
    }
    built = {name: training_step(size, settings.tokens, way) for name, way in ways.items()}
    frozen = nn.Linear(size, size, bias=False).requires_grad_(False)
    x, dy = torch.randn(settings.tokens, size, requires_grad=True), torch.randn(settings.tokens, size)
    runs = {"frozen weight, no step": lambda: frozen(x).backward(dy)} | {name: run for name, (run, _) in built.items()}
    samples = timer_for(x.device, settings.clock).interleaved(runs, settings.rounds)
    return [
        Line(name, Summary.of(seconds).median, nbytes=state_bytes(built[name][1]) if name in built else 0)
        for name, seconds in samples.items()
    ]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() > 0)


def table(lines: list[Line]) -> str:
    rows = [("", "ms", "captured / best", "state, MB")]
    for line in lines:
        captured = "" if line.captured is None else f"{line.captured:.4f}"
        nbytes = "" if line.nbytes is None else f"{line.nbytes / 1e6:.2f}"
        rows.append((line.name, f"{1e3 * line.seconds:.1f}", captured, nbytes))
    return messages.table(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = command("galore", __doc__, 9, "clock")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--training", type=int, metavar="STEPS", help="train the small language model too")
    parser.add_argument("--bases", action="store_true", help="bases of MiniLM's gradients too (bench/galore/bases.py)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    out, result = record_of("galore", options)
    settings = Settings(
        tuple(options.sizes), options.rank, options.tokens, options.rounds, options.threads, options.clock
    )
    roof = machine.measure_roof(torch.device("cpu"), "float32", timer_for(torch.device("cpu"), options.clock))
    print(f"roof: {roof.flops / 1e9:.0f} GFLOP/s, {roof.bandwidth / 1e9:.1f} GB/s", flush=True)
    result |= {"settings": asdict(settings), "roof": asdict(roof), "refresh": {}, "step": {}}
    for size in settings.sizes:
        for kind, measure in (("refresh", refreshes), ("step", steps)):
            lines = measure(size, settings)
            result[kind][str(size)] = [asdict(line) for line in lines]
            print(f"\n{kind}, {size} x {size}, r = {settings.rank}\n{table(lines)}", flush=True)
    if options.training:
        result["training"] = training.measure(options.training)
        print(f"\ntraining, {options.training} steps\n{training.table(result['training'])}")
    if options.bases:
        result["bases"] = bases.measure()
        print(f"\nbases of real gradients\n{bases.table(result['bases'])}")
    write_json(out, result)
    print(f"\nwritten to {out}")
    return 0
