"""LoRA-GA's sketch at the shapes of a large model, on synthetic gradients: `python -m bench lora_ga --shapes
llama-2-7b`.

X and dY come from a few hundred latent directions whose strengths decay as (1 + i)^-0.4, in part the same in all
micro-batches, and noise: the gradient's singular values then decay about as those of MiniLM do
(docs/details/lora_ga_measured.md). Two parts:

- `compare`: single layers, one after the other, with the peers next to the sketch: time, peak memory beyond inputs, and
  alignment error over the best possible.
- `whole_model`: every layer of the model in every micro-batch, in the order of backward passes: what the sketch adds to
  those, in time and in memory.
"""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.init.factors import split_factors
from fastlora.init.streaming import StreamingSketch, svd_of_each
from fastlora.linalg import native, orthonormal

from ..harness import machine
from ..harness.turns import write_json

Batch = tuple[Tensor, Tensor]
Halves = tuple[Tensor, Tensor]
LATENT = 256
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)


@dataclass(frozen=True)
class Layer:
    """y = x Wᵀ with W (n, m)."""

    name: str
    n: int
    m: int


def _blocks(count: int, hidden: int, intermediate: int) -> list[Layer]:
    shapes = [(name, hidden, hidden) for name in ("q", "k", "v", "o")]
    shapes += [(name, intermediate, hidden) for name in ("gate", "up")] + [("down", hidden, intermediate)]
    return [Layer(f"{block}.{name}", n, m) for block in range(count) for name, n, m in shapes]


MODELS = {"llama-2-7b": _blocks(32, 4096, 11008), "tiny": _blocks(2, 64, 160)}


@dataclass(frozen=True)
class Settings:
    shapes: str
    r: int
    width: int
    tokens: int  # of one micro-batch
    micro_batches: int
    dtype: str
    device: str

    def batch(self, index: int, layer: Layer, number: int) -> Batch:
        """X (T, m) and dY (T, n) of one micro-batch at one layer; the same for the same arguments."""
        device, k = torch.device(self.device), min(LATENT, layer.n, layer.m)
        decay = (1.0 + torch.arange(k, device=device)) ** -0.4

        def draw(seed: int, *sizes: tuple[int, int]) -> list[Tensor]:
            generator = torch.Generator(device).manual_seed(1000 * index + seed)
            return [torch.randn(size, generator=generator, device=device) for size in sizes]

        mix_x, mix_y = draw(0, (k, layer.m), (k, layer.n))
        hidden, other, noise_x, noise_y = draw(
            1 + number, (self.tokens, k), (self.tokens, k), (self.tokens, layer.m), (self.tokens, layer.n)
        )
        x = noise_x.addmm_(hidden * decay, mix_x, beta=0.5)
        dy = noise_y.addmm_((hidden + 0.5 * other) * decay, mix_y, beta=0.5).mul_(1e-3)
        return x.to(getattr(torch, self.dtype)), dy.to(getattr(torch, self.dtype))

    def batches(self, index: int, layer: Layer) -> list[Batch]:
        return [self.batch(index, layer, number) for number in range(self.micro_batches)]


class Meter:
    """Seconds and peak bytes of what runs between `start` and `stop`; `seconds` sums, `peak` is the largest.

    On a GPU by CUDA events and the allocator's own count, elsewhere by the clock and the process's resident memory
    (None where the kernel does not let it be reset).
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.seconds, self.peak = device.type == "cuda", 0.0, 0
        self.can_measure_memory = self.cuda or _return_freed_memory()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        else:
            if self.can_measure_memory:
                Path("/proc/self/clear_refs").write_text("5")
            self._begun = time.perf_counter()

    def stop(self, before: int) -> None:
        """`before`: the bytes allocated without what is measured."""
        if self.cuda:
            self._events[1].record()
            torch.cuda.synchronize()
            self.seconds += self._events[0].elapsed_time(self._events[1]) / 1e3
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)
        else:
            self.seconds += time.perf_counter() - self._begun
            if self.can_measure_memory:
                self.peak = max(self.peak, _status("VmHWM") - before)

    def result(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "peak_bytes": self.peak if self.can_measure_memory else None}


def _return_freed_memory() -> bool:
    """Makes malloc give freed blocks back at once, so that resident memory means something; whether it can be seen."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_THRESHOLD, 65536)
        libc.malloc_trim(0)  # what was freed before would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


# The measure.
class Truth:
    """The exact gradient of one layer by its products, and what no update of rank 2r can reach, in float64."""

    def __init__(self, batches: list[Batch], r: int) -> None:
        x, dy = (torch.cat(factors).double() for factors in zip(*batches))
        self.x, self.dy = x, dy
        if len(x) < min(x.shape[1], dy.shape[1]):  # G = dYᵀX = Q R_y R_xᵀ Qᵀ
            core = torch.linalg.qr(dy.t(), mode="r")[1] @ torch.linalg.qr(x.t(), mode="r")[1].t()
        else:
            core = dy.t() @ x
        gram = core @ core.t() if core.shape[0] <= core.shape[1] else core.t() @ core
        squares = torch.linalg.eigvalsh(gram).clamp(min=0)
        self.total, self.optimum = squares.sum().item(), squares[: -2 * r].sum().item()

    def error(self, a: Tensor, b: Tensor) -> float:
        """‖G − c·(B Bᵀ G + G Aᵀ A)‖² with the best c, over the optimum. G itself is not formed."""
        a, b = a.double(), b.double()
        by_b, by_a = self.x.t() @ (self.dy @ b), self.dy.t() @ (self.x @ a.t())  # GᵀB, G Aᵀ
        along = by_b.square().sum() + by_a.square().sum()  # the step's inner product with G
        size = ((b.t() @ b) * (by_b.t() @ by_b)).sum() + ((a @ a.t()) * (by_a.t() @ by_a)).sum()
        size = size + 2 * ((b.t() @ by_a) * (a @ by_b).t()).sum()
        return (self.total - (along**2 / size).item()) / self.optimum


# The contenders: each takes the micro-batches of a layer and gives A (r, m) and B (n, r).
def by_sketch(settings: Settings, layer: Layer, batches: list[Batch], rounds: int = 1) -> Halves:
    sketch = StreamingSketch(layer.n, layer.m, settings.width, 0, settings.device)
    for number in range(rounds):
        if number:
            sketch.start_refining()
        for x, dy in batches:
            sketch.update(x, dy)
    return _split(*sketch.svd(2 * settings.r), settings.r)


def by_two_sided_sketch(settings: Settings, layer: Layer, batches: list[Batch]) -> Halves:
    """Y = G Ω and W = Ψ G in one pass (Tropp et al. 2017), as many numbers as the sketch's Q and Z."""
    k = settings.width * 2 // 3
    device = torch.device(settings.device)
    generator = torch.Generator(device).manual_seed(0)
    omega = torch.randn(layer.m, k, generator=generator, device=device)
    psi = torch.randn(layer.n, 2 * k, generator=generator, device=device)
    y, w = torch.zeros(layer.n, k, device=device), torch.zeros(layer.m, 2 * k, device=device)
    for x, dy in batches:
        y += native.factored_product(x, dy, omega, 1.0)
        w += native.factored_product(dy, x, psi, 1.0)
    q = orthonormal(y)
    core = torch.linalg.lstsq((psi.t() @ q).double(), w.t().double()).solution
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return _split((q.double() @ u).float(), s.float(), vh.float(), settings.r)


def by_svd_lowrank(settings: Settings, layer: Layer, batches: list[Batch]) -> Halves:
    """torch.svd_lowrank of the full gradient in float32, with the original code's settings."""
    gradient = torch.zeros(layer.n, layer.m, device=settings.device)
    for x, dy in batches:
        gradient += (dy.t() @ x).float()
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * settings.r, *gradient.shape), niter=4)
    return _split(u, s, v.t(), settings.r)


class OneLayer(nn.Module):
    def __init__(self, layer: Layer, like: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(layer.m, layer.n, bias=False, device="meta").to_empty(device=like.device).to(like.dtype)
        nn.init.normal_(self.linear.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def by_peft(settings: Settings, model: OneLayer, batches: list[Batch]) -> Halves:
    """PEFT's LoRA-GA with its defaults."""
    import peft
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga  # type: ignore[attr-defined]

    def passes() -> None:
        for x, dy in batches:
            model(x).backward(dy)

    config = peft.LoraConfig(
        r=settings.r, target_modules=["linear"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()  # type: ignore[arg-type]
    )  # fmt: skip
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        preprocess_loraga(model, config, passes)  # type: ignore[arg-type]
        adapted: Any = peft.get_peft_model(model, config).base_model.model.linear  # type: ignore[arg-type,union-attr]
    return tuple(part["default"].weight.detach() for part in (adapted.lora_A, adapted.lora_B))  # type: ignore[return-value]


def _split(u: Tensor, s: Tensor, vh: Tensor, r: int) -> Halves:
    return split_factors(u[:, : 2 * r], vh[: 2 * r], r, "ArB2r")


def compare(settings: Settings, indices: list[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every contender at these layers of the model, one layer at a time."""
    out = []
    for index in indices:
        layer = MODELS[settings.shapes][index]
        out.append(_compare_at(settings, layer, settings.batches(index, layer)))
        for name, result in out[-1]["contenders"].items():
            peak = "?" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e6:.1f}"
            say(
                f"{layer.n:6d} x {layer.m:<6d} {name:34s} error/optimum {result['error']:.4f}  "
                f"{result['seconds']:7.3f} s  {peak} MB"
            )
    return out


def _compare_at(settings: Settings, layer: Layer, batches: list[Batch]) -> dict[str, Any]:
    device, truth = torch.device(settings.device), Truth(batches, settings.r)
    contenders: dict[str, Callable[[], Halves]] = {
        "sketch": lambda: by_sketch(settings, layer, batches),
        "sketch, refined": lambda: by_sketch(settings, layer, batches, rounds=2),
        "two-sided sketch": lambda: by_two_sided_sketch(settings, layer, batches),
        "svd_lowrank of the full gradient": lambda: by_svd_lowrank(settings, layer, batches),
    }
    results = {name: _measured(device, contender, truth) for name, contender in contenders.items()}
    if _peft_has_lora_ga():
        model = OneLayer(layer, batches[0][0])
        forward = _measured(device, lambda: [model(x) for x, _ in batches], None)
        name = "PEFT's LoRA-GA"
        results[name] = _measured(device, lambda: by_peft(settings, model, batches), truth)
        results[name]["seconds"] -= forward["seconds"]  # what training does anyway
    return {**asdict(layer), "optimum": truth.optimum / truth.total, "contenders": results}


def _peft_has_lora_ga() -> bool:
    try:
        from peft.tuners.lora import preprocess_loraga  # type: ignore[attr-defined]  # noqa: F401
    except ImportError:
        return False
    return True


def _measured(device: torch.device, run: Callable[[], Any], truth: Truth | None) -> dict[str, Any]:
    meter = Meter(device)
    before = meter.allocated()
    meter.start()
    halves = run()
    meter.stop(before)
    return meter.result() | ({} if truth is None else {"error": truth.error(*halves)})


def whole_model(settings: Settings) -> dict[str, Any]:
    """Every layer's updates, then every layer's triplets: what comes on top of the backward passes themselves."""
    device, layers = torch.device(settings.device), MODELS[settings.shapes]
    by_sketch(settings, layers[0], [settings.batch(0, layers[0], 0)])  # warm: libraries, self-checks
    updates, finals = Meter(device), Meter(device)
    base = updates.allocated()
    sketches = [StreamingSketch(layer.n, layer.m, settings.width, i, device) for i, layer in enumerate(layers)]
    for number in range(settings.micro_batches):
        for index in reversed(range(len(layers))):
            x, dy = settings.batch(index, layers[index], number)
            updates.start()
            sketches[index].update(x, dy)
            updates.stop(base + x.nbytes + dy.nbytes)
            del x, dy
    finals.start()
    kept = [
        tuple(half.clone() for half in _split(*triplets, settings.r))
        for triplets in svd_of_each(sketches, 2 * settings.r)
    ]
    finals.stop(base)
    why = native.why_not(device)
    return {
        "layers": len(layers),
        "linalg": "compiled" if why is None else f"torch: {why}",
        "update_seconds": updates.seconds,
        "final_seconds": finals.seconds,
        "seconds": updates.seconds + finals.seconds,
        "peak_bytes": max(updates.peak, finals.peak) if updates.can_measure_memory else None,
        "state_bytes": sum(sketch.nbytes for sketch in sketches),
        "factor_bytes": sum(half.nbytes for halves in kept for half in halves),
    }


def distinct(layers: list[Layer], count: int) -> list[int]:
    """`count` layers: one of each shape first."""
    firsts = {(layer.n, layer.m): index for index, layer in reversed(list(enumerate(layers)))}
    chosen = sorted(firsts.values())
    return (chosen + [index for index in range(len(layers)) if index not in chosen])[:count]


def run(settings: Settings, layers: int, whole: bool, out: str | None, say: Callable[[str], None] = print) -> None:
    facts, chosen = machine.describe(torch.device(settings.device)), asdict(settings)
    say(", ".join(f"{key} {value}" for key, value in (facts | chosen).items() if value is not None))
    result = dict[str, Any](machine=facts, settings=chosen)
    with torch.no_grad():
        if whole:
            result["whole_model"] = whole_model(settings)
            say("whole model: " + ", ".join(f"{key} {value}" for key, value in result["whole_model"].items()))
            if out:
                write_json(Path(out), result)  # what follows takes longer and matters less
        result["compare"] = compare(settings, distinct(MODELS[settings.shapes], layers), say)
    if out:
        write_json(Path(out), result)
