"""Timing several things fairly: interleaved, so that a machine that slows down slows all of them down.

On a GPU each function is captured in a CUDA graph, which takes the launch gaps out, and replayed between events; the
caller rotates over inputs larger than twice the L2 inside the captured function. On a CPU it is `perf_counter` around
the call.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Summary:
    """Seconds: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float], divide_by: int = 1) -> Summary:
        if not seconds:
            raise ValueError("Summary.of: got no samples, want at least one")
        ordered = sorted(value / divide_by for value in seconds)
        return cls(_quantile(ordered, 0.5), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered))


def _quantile(ordered: list[float], q: float) -> float:
    """Linear interpolation between closest ranks."""
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Timer:
    """Seconds per call of several functions, measured in turns. `interleaved` leaves nothing behind."""

    def interleaved(self, functions: dict[str, Callable[[], object]], rounds: int) -> Samples:
        raise NotImplementedError

    def check(self, function: Callable[[], object]) -> None:
        """Raises what timing the function would raise: a caller can then leave out that one alone."""
        function()


class CpuTimer(Timer):
    """`perf_counter`, or processor time (`clock="cpu"`, summed over threads), which others on the machine disturb
    less."""

    def __init__(self, clock: str = "wall"):
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[clock]

    def interleaved(self, functions: dict[str, Callable[[], object]], rounds: int) -> Samples:
        for function in functions.values():
            function()
            function()
        samples: Samples = {name: [] for name in functions}
        names = list(functions)
        collecting = gc.isenabled()
        gc.disable()
        try:
            for turn in range(rounds):
                for name in _rotated(names, turn):
                    start = self.clock()
                    functions[name]()
                    samples[name].append(self.clock() - start)
        finally:
            if collecting:
                gc.enable()
        return samples


class CudaTimer(Timer):
    """Replays of CUDA graphs between events, all in one stream."""

    def interleaved(self, functions: dict[str, Callable[[], object]], rounds: int) -> Samples:
        graphs = {name: self.capture(function) for name, function in functions.items()}
        samples: Samples = {name: [] for name in graphs}
        names = list(graphs)
        for turn in range(rounds + 1):
            for name in _rotated(names, turn):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graphs[name].replay()
                end.record()
                end.synchronize()
                if turn:  # the first replay uploads the graph
                    samples[name].append(start.elapsed_time(end) * 1e-3)
        return samples

    def check(self, function: Callable[[], object]) -> None:
        stream = torch.cuda.current_stream()
        try:
            self.capture(function)
        finally:  # a capture that fails leaves its own stream behind as the current one
            torch.cuda.set_stream(stream)

    @staticmethod
    def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compilation, self-checks and workspaces happen here, not in the capture
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph


def _rotated(names: list[str], turn: int) -> list[str]:
    """The names in another order every turn, so that none always follows the same other one."""
    start = turn % len(names)
    return names[start:] + names[:start]


def timer_for(device: torch.device, clock: str = "wall") -> Timer:
    return CudaTimer() if device.type == "cuda" else CpuTimer(clock)
