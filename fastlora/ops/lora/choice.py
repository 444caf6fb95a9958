"""Which backend runs a call, and why.

On a CPU: `torch`. On a GPU: what was measured to be fastest for this kind of call, forward and backward apart
(measure.py, runtime/cache.py), where anything but `cublas` must be at least 2 % faster than it; where nothing has been
measured, `cublas`, which needs no better GEMM than cuBLAS's own to win over eager PyTorch. A backend that cannot take a
call, or has failed its self-check on the device, is passed over: triton, cublas, torch.

`backend=` and `FASTLORA_BACKEND` ask for one by name. `FASTLORA_MEASURE` and `measuring(...)` say whether a first call
may measure; docs/performance.md says when it does.

A choice is remembered for the process: the next call of its kind is a look-up.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import configs
from ...runtime import cache as tuning_cache
from ...runtime import compiled, env
from ...runtime.trust import NOT_YET, Trusted, first_difference, module_or_reason, nothing_can_run, seeded, too_old
from .. import reference
from . import aten, measure

__all__ = ["BACKENDS", "CANDIDATES", "Choice", "Passes", "load", "measuring", "peek", "reset", "select", "self_check"]


FALL_DOWN = ("triton", "cublas", "torch")


BACKENDS = env.BACKENDS


CANDIDATES = ("cublas", "triton", "triton_s_inside", "torch")  # what is measured; the first that runs is the baseline


MODULES = {"torch": "aten"}  # where a backend's module has another name than the backend
FAMILY = {"triton_s_inside": "triton"}  # the backend that a candidate is a form of


MARGIN = 0.02  # by how much another candidate must be faster than the baseline


BUDGET_S = 60.0  # what a process spends on measuring by itself, compilation included


logger = logging.getLogger("fastlora")


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass of different backends: they agree about S and about dropout's seed."""

    forward: Any
    backward: Any


class Choice(NamedTuple):
    """The backend that takes a call (its forward pass, where they differ), what to call, and the reason: why it was
    preferred, or why better ones could not. `passes`: the candidates of the forward and of the backward pass."""

    name: str
    module: ModuleType | Passes
    reason: str
    passes: tuple[str, str] = ("", "")


class Call(NamedTuple):
    """The tensors of a call, x in 2-D."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dropout_p: float


_ASKED_FOR_TORCH = Choice("torch", aten, "asked for", ("torch", "torch"))


_NOT_A_GPU = Choice("torch", aten, "not on a GPU: ATen is the path there", ("torch", "torch"))


_modules: dict[str, ModuleType | str] = {}  # a module, or why it cannot be imported


INSTEAD = "another backend runs (`python -m fastlora.doctor` says which)"


_trusted = {name: Trusted(f"backend {name!r}", INSTEAD) for name in CANDIDATES if name != "torch"}


_choices: dict[Any, Choice] = {}


_provisional: dict[Any, Choice] = {}  # made where nothing could be checked or measured: made again when that is over


known: dict[tuple[str, Any], tuple[Any, int]] = {}  # autograd.known_call's and, by several scales, group.known_group's


_refused: dict[tuple[torch.device, measure.Key], str] = {}  # what could not be measured, and why: not tried again


_lock = threading.RLock()


_mode: str | None = None  # set by `measuring`


_spent_s = 0.0


def select(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    backend: str = "auto",
    narrow: bool = False,
) -> Choice:
    """The backend for a call with 2-D `x`. Raises ValueError for a name that is none of BACKENDS."""
    asked = env.backend_text() if backend == "auto" else backend
    if not asked and not x.is_cuda:
        return _NOT_A_GPU
    key = (
        asked,
        x.device,
        x.dtype,
        (x.shape[0] - 1).bit_length(),
        weight.shape,
        weight.dtype,
        weight.is_contiguous(),
        None if bias is None else bias.dtype,
        lora_A.shape[0],
        lora_A.dtype,
        lora_B.dtype,
        dropout_p > 0.0,
        narrow,
        # Within a graph only the device's time counts.
        x.is_cuda and torch.cuda.is_current_stream_capturing(),
    )
    return _choices.get(key) or _resolve(key, Call(x, weight, bias, lora_A, lora_B, dropout_p), backend, narrow)


def is_final(choice: Choice) -> bool:
    return all(choice is not other for other in _provisional.values())


def _resolve(key: Any, call: Call, backend: str, narrow: bool) -> Choice:
    with _lock:
        if key in _choices:  # another thread's
            return _choices[key]
        provisional = _provisional.get(key)
        if provisional is not None and (nothing_can_run(call.x.device) or _is_watched()):
            return provisional  # the same all through a capture or a profile, backward as forward
        resolver = Resolver(call, narrow)
        choice = resolver.choose(backend)
        if resolver.put_off is None:
            _choices[key] = choice
            for in_a_graph in (False, True):  # the next capture's too
                _provisional.pop((*key[:-1], in_a_graph), None)
        else:
            _provisional[key] = choice
        return choice


def reset() -> None:
    """Forgets every choice, self-check and measured time of this process; the cache files stay."""
    global _spent_s
    with _lock:
        for memory in (_choices, _provisional, _refused, known, *(trusted.verdicts for trusted in _trusted.values())):
            memory.clear()
        _modules.clear()
        tuning_cache.for_device.cache_clear()
        _spent_s = 0.0


@contextlib.contextmanager
def measuring(mode: str) -> Iterator[None]:
    """Within it `FASTLORA_MEASURE` is "auto", "off" or "always", in every thread. Choices already made stay."""
    global _mode
    if mode not in env.MEASURE:
        raise ValueError(f"fastlora: measuring: mode: got {mode!r}, want one of {', '.join(env.MEASURE)}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def load(name: str) -> ModuleType:
    """The module of a backend or candidate. Raises RuntimeError where it cannot be imported (Triton missing)."""
    module = _import(name)
    if isinstance(module, str):
        raise RuntimeError(f"fastlora: backend {name!r} cannot be loaded: {module}")
    return module


def _import(name: str) -> ModuleType | str:
    if name not in _modules:
        _modules[name] = module_or_reason(f"fastlora.ops.lora.{MODULES.get(name, name)}")
        if name != "torch" and isinstance(_modules[name], ModuleType) and compiled.load_if_built():
            _use_compiled_plans(True)
    return _modules[name]


def _use_compiled_plans(use: bool) -> None:
    """Whether kernels' launch plans run in csrc/plans.cpp: where that is compiled, until it is found wrong."""
    global _plans_were_wrong
    from ...kernels import launch

    _plans_were_wrong |= not use
    launch.use_native(None if _plans_were_wrong else torch.ops.fastlora)


_plans_were_wrong = False


class Resolver:
    """One choice in the making. With `run` False nothing is checked and nothing measured: self-checks that have not
    been made are taken to pass, and listed in `assumed`."""

    def __init__(self, call: Call, narrow: bool = False, run: bool = True) -> None:
        self.call = call
        self.narrow = narrow
        self.run = run
        self.put_off: str | None = None  # why the choice is not final
        self.not_measured: str | None = None
        self.assumed: list[str] = []

    def choose(self, backend: str) -> Choice:
        requested = env.backend() if backend == "auto" else backend
        if requested not in BACKENDS:
            raise ValueError(f"fastlora: backend: got {requested!r}, want one of {', '.join(BACKENDS)}")
        if requested == "torch":
            return _ASKED_FOR_TORCH
        if requested == "auto" and not self.call.x.is_cuda:
            return _NOT_A_GPU
        if requested != "auto":
            return self._fall_down(requested, "asked for")
        entry = self._entry()
        choice = None if entry is None else self._by_times(entry)
        return choice or self._fall_down("cublas", f"default on a GPU: {self.not_measured or 'nothing was measured'}")

    def _fall_down(self, start: str, reason: str) -> Choice:
        """The first of FALL_DOWN from `start` on that can take the call."""
        reasons = [reason]
        for name in FALL_DOWN[FALL_DOWN.index(start) : -1]:
            why_not = self.why_not(name)
            if why_not is None:
                forward = self._form_of_triton(reasons) if name == "triton" else name
                return _choice(forward, name, "; ".join(reasons))
            reasons.append(f"{name}: {why_not}")
        return Choice("torch", aten, "; ".join(reasons[1:]), ("torch", "torch"))

    def _form_of_triton(self, reasons: list[str]) -> str:
        """Where S is made for a call that asks for triton: by rule, since nobody asked for a measurement."""
        _, weight, _, lora_A, _, dropout_p = self.call
        if not configs.s_inside(weight.shape[0], lora_A.shape[0], self.call.x.dtype, lora_A.dtype, dropout_p):
            return "triton"
        why_not = self.why_not("triton_s_inside")
        if why_not is not None:
            reasons.append(f"S inside the GEMM: {why_not}")
        return "triton" if why_not else "triton_s_inside"

    # What was measured.

    def _entry(self) -> tuning_cache.Entry | None:
        """Measured times, from the cache or measured now; or None, with the reason in `not_measured`."""
        x, weight, _, lora_A, lora_B, dropout_p = self.call
        if lora_A.dtype != lora_B.dtype:
            self.not_measured = "lora_A and lora_B of two dtypes are not measured"
            return None
        key = measure.key_of(x, weight, lora_A, dropout_p, self.narrow)
        cache = tuning_cache.for_device(x.device)
        if str(key) in cache.entries:
            return cache.entries[str(key)]
        if (x.device, key) in _refused:
            self.not_measured = _refused[x.device, key]
            return None
        self.not_measured, transient = _why_not_measure(x)
        if self.not_measured is not None:
            self.put_off = self.not_measured if transient else self.put_off
            return None
        if not self.run:
            self.not_measured = "not measured yet: the first call of its kind will"
            return None
        entry, self.not_measured = self.measure(key, time.monotonic() + BUDGET_S - _spent_s)
        if self.not_measured is not None:
            _refused[x.device, key] = self.not_measured
        return entry

    def measure(self, key: measure.Key, deadline: float) -> tuple[tuning_cache.Entry | None, str | None]:
        """Measures every candidate that can take the call and keeps the times; or None and the reason."""
        global _spent_s
        device, begun = self.call.x.device, time.monotonic()
        cache = tuning_cache.for_device(device)
        cache.refresh()
        if str(key) in cache.entries:  # another process has measured it
            return cache.entries[str(key)], None
        why_not = {name: self.why_not(name) for name in CANDIDATES}
        if key.dropout and why_not["torch"] is None:  # its dropout state is a mask: the others' passes could not follow
            why_not["torch"] = "not among the candidates with dropout"
        able = {name: load(name) for name in CANDIDATES if why_not[name] is None}
        try:
            if len(able) < 2:
                return None, f"only {', '.join(able) or 'torch'} can take it"
            found = measure.measure(key, able, device, deadline=deadline)
        except measure.ShortOfMemory as error:
            return None, str(error)
        except torch.OutOfMemoryError:
            return None, "measuring ran out of memory"
        except Exception as error:  # whatever it was, training goes on as if nothing had been tried
            logger.warning("measuring %s failed: %s: %s", key, type(error).__name__, error)
            return None, f"measuring failed: {type(error).__name__}: {error}"
        finally:
            _spent_s += time.monotonic() - begun
        left_out = {name: why for name, why in (why_not | found.left_out).items() if why is not None}
        entry = {"forward": found.forward, "backward": found.backward, "left_out": left_out, "host": found.host}
        cache.put(str(key), entry)
        logger.info("measured %s in %.1f s: %s", key, time.monotonic() - begun, describe(entry))
        return entry, None

    def _by_times(self, entry: tuning_cache.Entry) -> Choice | None:
        """The choice that an entry's times make among the candidates that can take the call; None where none can."""
        names = []
        for direction in tuning_cache.DIRECTIONS:
            eager = not nothing_can_run(self.call.x.device)
            times = costs(entry, direction, eager)
            name = fastest(times)
            in_a_graph = fastest(entry[direction])
            if eager and in_a_graph not in (name, None):
                self.why_not(in_a_graph)  # checked now, while it can be
            while name is not None and self.why_not(name) is not None:
                del times[name]
                name = fastest(times)
            if name is None or (name == "torch" and self.call.dropout_p > 0.0):
                return None
            names.append(name)
        return _choice(names[0], names[1], f"measured: {describe(entry)}")

    # Who can take the call.

    def why_not(self, name: str) -> str | None:
        module = _import(name)
        if isinstance(module, str):
            return f"cannot be imported: {module}"
        on_gpu = name != "torch" and self.call.x.is_cuda
        reason = (too_old(self.call.x.device) if on_gpu else None) or module.unsupported(*self.call)
        return self._self_check_failure(name, module) if reason is None and on_gpu else reason

    def _self_check_failure(self, name: str, module: ModuleType) -> str | None:
        """None where the backend has been compared with the reference on this device and agrees; otherwise why it is
        not trusted."""
        x, lora_A = self.call.x, self.call.lora_A
        narrow = self.narrow and lora_A.dtype != x.dtype
        key = (x.device, x.dtype, lora_A.dtype, self.call.dropout_p > 0.0, narrow)
        if key not in _trusted[name].verdicts:
            if not self.run:
                self.assumed.append(name)
                return None
            if nothing_can_run(x.device):
                self.put_off = NOT_YET
        return _trusted[name].why_not(key, lambda: self_check(module, *key))


def _choice(forward: str, backward: str, reason: str) -> Choice:
    module = load(forward) if forward == backward else Passes(load(forward).forward, load(backward).backward)
    return Choice(FAMILY.get(forward, forward), module, reason, (forward, backward))


def costs(entry: tuning_cache.Entry, direction: str, eager: bool) -> dict[str, float]:
    """Seconds of each candidate: the device's, or the host's where that is slower and no graph queues the kernels."""
    host = entry.get("host", {}).get(direction, {}) if eager else {}
    return {name: max(seconds, host.get(name, 0.0)) for name, seconds in entry[direction].items()}


def fastest(times: dict[str, float]) -> str | None:
    """The candidate to take: the baseline (cublas, else the next of CANDIDATES that has a time), unless another is at
    least MARGIN faster."""
    baseline = next((name for name in CANDIDATES if name in times), None)
    if baseline is None:
        return None
    best = min((name for name in CANDIDATES if name in times), key=times.__getitem__)
    return best if times[best] <= (1.0 - MARGIN) * times[baseline] else baseline


def describe(entry: tuning_cache.Entry) -> str:
    """Costs of eager calls: "forward triton 812.0 µs (cublas 840.1, torch 902.5), backward cublas 1604.2 µs"."""
    parts = []
    for direction in tuning_cache.DIRECTIONS:
        seconds = costs(entry, direction, eager=True)
        times = {name: f"{1e6 * value:.1f}" for name, value in seconds.items()}
        name = fastest(seconds)
        others = ", ".join(f"{other} {time}" for other, time in times.items() if other != name)
        chosen = "nothing" if name is None else f"{name} {times[name]} µs"
        parts.append(f"{direction} {chosen}{f' ({others})' if others else ''}")
    return ", ".join(parts)


# Whether now is a time to measure.
def _is_watched() -> str | None:
    """Who would see a measurement's kernels as the user's own, unless the user wants that."""
    if (_mode or env.measure()) == "always":
        return None
    if torch.autograd._profiler_enabled():
        return "a profiler is running"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a torch dispatch mode is active"
    return None


def _in_private_pool(device: torch.device) -> bool:
    """Whether what is allocated now belongs to a CUDA graph's pool, or another of the user's: a measurement's tensors
    would stay in it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    address = torch.empty(1, device=device).data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if 0 <= address - segment["address"] < segment["total_size"]:
            return tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    return False


def _why_not_measure(x: Tensor) -> tuple[str | None, bool]:
    """(None, or why a first call must not measure; whether a later call of its kind may be asked again)."""
    mode = _mode or env.measure()
    if mode == "off":
        return "measuring is off", False
    if nothing_can_run(x.device):
        return "nothing can be measured during capture or compilation", True
    watched = _is_watched()
    if watched is not None:
        return f"not measured while {watched}", True
    if _in_private_pool(x.device):
        return "not measured while allocations go to a CUDA graph's memory pool", True
    if mode != "always":
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            return "a distributed run does not measure: `python -m fastlora.tune` does so ahead", False
        if torch.are_deterministic_algorithms_enabled():
            return "torch.use_deterministic_algorithms is on, and times differ between runs", False
    if _spent_s >= BUDGET_S:
        return f"this process has measured for {_spent_s:.0f} s: `python -m fastlora.tune` does so ahead", False
    return None, False


class Peek(NamedTuple):
    """What would happen to a call, without anything being run for it."""

    choice: Choice
    key: measure.Key
    entry: tuning_cache.Entry | None  # measured times
    not_measured: str | None
    candidates: dict[str, str]  # of each: "passed", "not checked yet", "needs no check", or why it cannot take the call
    provisional: str | None  # why a later call may get another choice


def peek(call: Call, backend: str = "auto", narrow: bool = False) -> Peek:
    """What `select` would say, and on what grounds: nothing is checked, measured or remembered."""
    with _lock:
        resolver = Resolver(call, narrow, run=False)
        choice = resolver.choose(backend)
        key = measure.key_of(call.x, call.weight, call.lora_A, call.dropout_p, narrow)
        cuda = call.x.is_cuda
        entry = tuning_cache.for_device(call.x.device).entries.get(str(key)) if cuda else None
        candidates = {}
        for name in CANDIDATES:
            reason = resolver.why_not(name)
            if reason is None:
                reason = "needs no check" if name == "torch" or not cuda else "passed its self-check"
            candidates[name] = "not checked yet" if name in resolver.assumed else reason
        return Peek(choice, key, entry, resolver.not_measured, candidates, resolver.put_off)


def self_check(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    narrow: bool = False,
) -> str | None:
    """Compares a backend's forward and gradients with the fp64 reference on a small problem that divides nothing.

    None where they agree, else what differs. With dropout the mask is read off the backend itself: with A = I, S is
    drop(x). The generators' states are left as they were.
    """
    p = 0.25 if dropout else 0.0
    with seeded(device), torch.no_grad():
        for sizes in (ODD, *(ALIGNED if device.type == "cuda" else ())):
            problem = (module, device, dtype, adapter_dtype, p, narrow, sizes)
            found = _compare_with_reference(*problem)
            if found is not None and compiled.load_if_built() and module is not aten:
                _use_compiled_plans(False)  # which may be what is wrong
                found = _compare_with_reference(*problem)
            if found is not None:
                return found if sizes is ODD else f"at {sizes}: {found}"
    return None


# M, N, K and r. What divides nothing, with a rank that is small enough for S inside the GEMM; then what compiles to the
# code of real shapes: tiles, stages, reads of 16 bytes, with and without parts to be summed (test_choice.py compares).
ODD = (203, 152, 72, 10)
ALIGNED = ((2048, 2048, 1024, 16), (8192, 256, 512, 16), (256, 512, 512, 16))


def _compare_with_reference(
    module: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout_p: float,
    narrow: bool,
    sizes: tuple[int, int, int, int],
) -> str | None:
    m, n, k, r = sizes
    identity = dropout_p > 0.0 and sizes is ODD  # S is then drop(x), and shows the mask whatever made it
    r = k if identity else r
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    bias = torch.randn(n, device=device).to(dtype)
    a = torch.eye(k, device=device) if identity else torch.randn(r, k, device=device) * k**-0.5
    a, b = a.to(adapter_dtype), (torch.randn(n, r, device=device) * r**-0.5).to(adapter_dtype)
    dy = torch.randn(m, n, device=device).to(dtype)
    scaling = 1.5

    def passes() -> tuple[Any, Tensor, list[Tensor]]:
        y, s, state = module.forward(x, weight, bias, a, b, scaling, dropout_p, None, narrow)
        needs = (True, True, True)
        return state, s, [y, *module.backward(dy, x, weight, a, b, s, state, scaling, dropout_p, needs, narrow)]

    def disagreement(state: Any, s: Tensor, results: list[Tensor]) -> str | None:
        keep = None
        if identity:
            keep = s != 0
        elif dropout_p:
            from ...kernels.dropout import reference_keep_mask

            keep = reference_keep_mask(state, m, k, dropout_p) if state.dtype == torch.int64 else state != 0
        if keep is not None and not 0.6 < keep.double().mean().item() < 0.9:
            return f"the kept fraction is {keep.double().mean().item():.2f}, expected about {1 - dropout_p}"
        leaves = [t.double().requires_grad_() for t in (x, a, b)]
        with torch.enable_grad():
            y = reference.lora_linear(
                leaves[0], weight.double(), leaves[1], leaves[2], scaling, bias.double(), dropout_p, keep
            )
        wanted = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
        names = ("output", "gradient of x", "gradient of lora_A", "gradient of lora_B")
        return first_difference(zip(names, results, wanted, strict=True), dtype)

    first, second = passes(), passes()  # the second from a plan (kernels/launch.py), as all but a kind's first call
    wrong = disagreement(*first) or disagreement(*second)
    if wrong is None and not dropout_p and not all(map(torch.equal, first[2], second[2])):
        wrong = "a second call with the same arguments gives other bits than the first"
    return wrong
