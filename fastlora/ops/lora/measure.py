"""How long each backend takes for one kind of call, forward and backward apart.

Every candidate runs its real kernels on random tensors of the call's sizes. Sets of inputs (x, dY and a weight) rotate
and are larger than twice the L2 together, since in a model a layer's weight is never where the layer before left it. On
a GPU one turn through the sets is captured in a CUDA graph, which takes out the launch gaps, and replayed between
events, candidates in turns, so that a clock that drops slows all of them; a candidate that cannot be captured is left
out. How long the host takes to queue a call is measured apart. On a CPU it is the wall clock.

Before a candidate is timed, what it computes at these very sizes is compared with ATen's, with dropout by the mask of
the seed: what is fast and wrong is left out, whichever it is. torch's generators are not touched.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import configs
from ...runtime.trust import relative_error
from . import aten

LARGEST_M = 16384  # beyond, everything grows with M alike
SMALLEST_M = 16
MINIMUM_L2 = 60 * 2**20  # of an H200: what rotates is larger than twice the device's
LIMIT_S = 0.03  # of one candidate's timed runs, in one direction
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30
MOST_SETS = 32
SHARE_OF_FREE_MEMORY = 0.5  # more, and nothing is measured: training needs it next

Function = Callable[[], object]


class Key(NamedTuple):
    """What a measurement holds for. M is rounded up to a power of two, from SMALLEST_M to LARGEST_M."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool
    by_column: bool = False  # the weight is a transposed one, as transformers' Conv1D has
    precision: str = "ieee"  # of fp32 products: ieee or tf32
    narrow: bool = False  # the adapters are cast to x's dtype (`call.low_rank_dtype`)

    def __str__(self) -> str:
        dtypes = f"{self.dtype}+{self.adapter_dtype}".replace("torch.", "")
        parts = [f"M{self.M}", f"N{self.N}", f"K{self.K}", f"r{self.r}", dtypes]
        parts += ["dropout"] * self.dropout + ["by_column"] * self.by_column + ["tf32"] * (self.precision == "tf32")
        parts += ["narrow"] * self.narrow
        return " ".join(parts)


def key_of(x: Tensor, weight: Tensor, lora_A: Tensor, dropout_p: float, narrow: bool = False) -> Key:
    """The key of a call with 2-D x (M, K), weight (N, K) and lora_A (r, K)."""
    return Key(
        bucket(x.shape[0]),
        weight.shape[0],
        weight.shape[1],
        lora_A.shape[0],
        x.dtype,
        lora_A.dtype,
        dropout_p > 0.0,
        not weight.is_contiguous() and weight.t().is_contiguous(),
        configs.input_precision(x.dtype),
        narrow and lora_A.dtype != x.dtype,
    )


def bucket(M: int) -> int:
    """M rounded up to a power of two within [SMALLEST_M, LARGEST_M]."""
    return min(LARGEST_M, max(SMALLEST_M, 1 << (M - 1).bit_length() if M > 0 else 0))


class Measurement(NamedTuple):
    """Seconds per call of the candidates, and why others have none."""

    forward: dict[str, float]
    backward: dict[str, float]
    left_out: dict[str, str]
    seconds: float  # what it all took, compilation included
    host: dict[str, dict[str, float]]  # by direction: seconds until a call has queued its kernels; empty on a CPU


class NotCapturable(Exception):
    """Why a candidate cannot be timed as the others are."""


class ShortOfMemory(Exception):
    """Why nothing was measured."""


def measure(
    key: Key,
    modules: dict[str, ModuleType],
    device: torch.device,
    clock: Clock | None = None,
    deadline: float = math.inf,
) -> Measurement:
    """Times `modules` (by candidate's name). After `deadline`, by
    `time.monotonic`, no further candidate is prepared.

    Raises ShortOfMemory where the inputs would take more than SHARE_OF_FREE_MEMORY of the free memory.
    """
    begun = time.monotonic()
    left_out: dict[str, str] = {}
    with _undisturbed(device):
        problem = Problem.random(key, device)
        clock = clock or clock_for(device)
        forward, backward = {}, {}
        host: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        expected: list[Tensor] | None = None
        for name, module in modules.items():
            if time.monotonic() > deadline:
                left_out[name] = "no time left for measuring"
                continue
            try:
                if expected is None:
                    expected = problem.expected()
                failure = _difference(problem.results(module), expected, key.dtype)
                if failure is not None:
                    left_out[name] = failure
                    continue
                passes = problem.forward(module), problem.backward(module)
                timed = clock.timed(passes[0]), clock.timed(passes[1])
                for direction, run in zip(host.values(), passes, strict=True):
                    direction[name] = clock.host(run) / len(problem.sets)
            except NotCapturable as error:  # its launch gaps would be timed, and the others' not
                left_out[name] = str(error)
                continue
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of one candidate: a kernel that does not compile at these sizes
                left_out[name] = f"{type(error).__name__}: {error}"
                continue
            forward[name], backward[name] = timed
        del expected
        medians = [
            {name: seconds / len(problem.sets) for name, seconds in interleaved(functions).items()}
            for functions in (forward, backward)
        ]
    return Measurement(medians[0], medians[1], left_out, time.monotonic() - begun, host)


def interleaved(timed: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of functions that return the seconds they took, run in turns, in another order every turn."""
    names = list(timed)
    if not names:
        return {}
    first = {name: function() for name, function in timed.items()}
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(LIMIT_S / max(1e-9, statistics.median(first.values())))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(timed[name]())
    return {name: statistics.median(values) for name, values in samples.items()}


class Problem:
    """Random tensors of a key's sizes, and a candidate's passes over them."""

    def __init__(self, key: Key, lora_A: Tensor, lora_B: Tensor, sets: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.key, self.lora_A, self.lora_B, self.sets = key, lora_A, lora_B, sets
        self.scaling, self.dropout_p = 2.0, 0.1 if key.dropout else 0.0
        self.seed = torch.full((1,), 20250101, dtype=torch.int64, device=lora_A.device) if key.dropout else None

    @classmethod
    def random(cls, key: Key, device: torch.device) -> Problem:
        M, N, K, r = key[:4]
        set_bytes = (M * K + M * N + N * K) * key.dtype.itemsize
        count = _number_of_sets(set_bytes, device)
        # Besides the inputs: what each pass makes, as wanted, as got and in the graphs; the mask's words.
        _check_memory(count * set_bytes + 6 * M * (N + K) * key.dtype.itemsize + 16 * M * K * key.dropout, device)
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, columns, device=device, dtype=dtype).normal_(generator=generator).mul_(scale)

        def weight() -> Tensor:
            rows, columns = (K, N) if key.by_column else (N, K)
            tensor = normal(rows, columns, K**-0.5, key.dtype)
            return tensor.t() if key.by_column else tensor

        lora_A, lora_B = normal(r, K, K**-0.5, key.adapter_dtype), normal(N, r, r**-0.5, key.adapter_dtype)
        sets = [(normal(M, K, 1.0, key.dtype), normal(M, N, 1.0, key.dtype), weight()) for _ in range(count)]
        return cls(key, lora_A, lora_B, sets)

    def _forward(self, module: ModuleType, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return module.forward(
            x, weight, None, self.lora_A, self.lora_B, self.scaling, self.dropout_p, self.seed, self.key.narrow
        )

    def _backward(self, module: ModuleType, dy: Tensor, x: Tensor, weight: Tensor, s: Tensor, state: Any) -> Any:
        a, b = self.lora_A, self.lora_B
        needs = (True, True, True)
        return module.backward(dy, x, weight, a, b, s, state, self.scaling, self.dropout_p, needs, self.key.narrow)

    def expected(self) -> list[Tensor]:
        """What `results` are to be, by ATen, with dropout's mask made from the seed: of no candidate."""
        mask, (x, dy, weight) = None, self.sets[0]
        if self.seed is not None:
            from ...kernels.dropout import reference_keep_mask

            mask = reference_keep_mask(self.seed, x.shape[0], x.shape[1], self.dropout_p)
        arguments = (self.lora_A, self.lora_B, self.scaling, self.dropout_p, mask, self.key.narrow)
        y, s, _ = aten.forward(x, weight, None, *arguments)
        return [y, s, *self._backward(aten, dy, x, weight, s, mask)]

    def results(self, module: ModuleType) -> list[Tensor]:
        """(y, S, dX, dA, dB) of the first set."""
        x, dy, weight = self.sets[0]
        y, s, state = self._forward(module, x, weight)
        return [y, s, *self._backward(module, dy, x, weight, s, state)]

    def forward(self, module: ModuleType) -> Function:
        """One forward pass over every set."""

        def run() -> None:
            for x, _, weight in self.sets:
                self._forward(module, x, weight)

        return run

    def backward(self, module: ModuleType) -> Function:
        """One backward pass over every set, each from the S of its own forward pass."""
        saved = [self._forward(module, x, weight)[1:] for x, _, weight in self.sets]

        def run() -> None:
            for (x, dy, weight), (s, state) in zip(self.sets, saved):
                self._backward(module, dy, x, weight, s, state)

        return run


def _number_of_sets(set_bytes: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    l2 = max(MINIMUM_L2, torch.cuda.get_device_properties(device).L2_cache_size)
    return min(MOST_SETS, max(2, math.ceil(2 * l2 / set_bytes)))


def _check_memory(needed: int, device: torch.device) -> None:
    """Raises ShortOfMemory. What torch's allocator holds and does not use counts as free."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > SHARE_OF_FREE_MEMORY * free:
        raise ShortOfMemory(f"memory is short: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")


def _difference(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> str | None:
    """None, or which result differs. A wrong kernel is wrong by 1, not by a rounding."""
    allowed = 4e-2 if dtype in (torch.bfloat16, torch.float16) else 5e-3
    names = ("output", "S", "gradient of x", "gradient of lora_A", "gradient of lora_B")
    for name, got, want in zip(names, results, expected):
        error = relative_error(got, want)
        if not error <= allowed:
            return f"{name} differs by {error:.1e} (relative) at these sizes, allowed {allowed:.0e}"
    return None


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and inference mode, on `device`."""
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), current:
        yield


# Clocks.
class Clock:
    """Turns a function into one that runs it once and returns the seconds it took."""

    def timed(self, function: Function) -> Callable[[], float]:
        """Raises NotCapturable where the function cannot be timed as others are."""
        raise NotImplementedError

    def host(self, function: Function) -> float:
        """Seconds until the function has queued its work; 0 where it waits for it."""
        return 0.0


class WallClock(Clock):
    """For a CPU, and for tests: `now` is any clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def timed(self, function: Function) -> Callable[[], float]:
        function()

        def run() -> float:
            begun = self.now()
            function()
            return self.now() - begun

        return run


class CudaClock(Clock):
    """Replays of a CUDA graph between two events, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()  # shared: only one graph runs at a time

    def timed(self, function: Function) -> Callable[[], float]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # compilation and cuBLAS's workspaces belong here and not in the capture
                function()
            self.stream.synchronize()
            try:
                replay = self._captured(function)
                replay()  # uploads the graph
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotCapturable(f"cannot be captured in a CUDA graph: {error}") from error
            self.stream.synchronize()

        def run() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(self.stream):
                start.record()
                replay()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

        return run

    def host(self, function: Function) -> float:
        samples = []
        with torch.cuda.stream(self.stream):
            for _ in range(FEWEST_ROUNDS):
                self.stream.synchronize()
                begun = time.perf_counter()
                function()
                samples.append(time.perf_counter() - begun)
            self.stream.synchronize()
        return statistics.median(samples)

    def _captured(self, function: Function) -> Function:
        # Not `torch.cuda.graph`, which empties the allocator's cache. "thread_local": a data loader's thread that pins
        # memory meanwhile must not fail.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
        return graph.replay


@functools.cache  # a new stream would bring another cuBLAS workspace
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else WallClock()
