"""Pretend to launch on a GPU that is not there: capture what a launcher asks for, compile it for the target, read the
machine code.

Inside `pretend(arch)` Triton believes in a GPU of that compute capability, and `kernel[grid](...)` records a `Launch`
instead of running. The signature, the specialisation (divisibility by 16, equality to 1, descriptors) and the options
come from Triton's own binder, so what is compiled is what the runtime would compile for these arguments. Meta tensors
do: nothing is read.
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import configs

# The largest shared memory one block may have, in bytes (CUDA programming guide, table of compute capabilities, less
# 1 KiB reserved).
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, an H100 or H200, a B200


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)`: all that Triton needs to compile it."""

    kernel: JITFunction
    arch: int
    grid: tuple[int, ...]
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> str:
        """Launches of one key compile to the same code."""
        parts = (self.name, self.arch, self.signature, self.constexprs, self.attrs, self.options)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments by name."""
        names = self.kernel.arg_names
        return {
            names[path[0]]: getattr(value, "value", value) for path, value in self.constexprs.items() if len(path) == 1
        }

    def compile(self) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)
        return triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=dict(self.options))


class _PretendedDriver:
    """The part of Triton's driver that a launch consults before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def pretend(arch: int) -> Iterator[list[Launch]]:
    """Records every launch inside the block, as if made on a GPU of compute capability `arch` (80, 90, 100)."""
    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **kwargs):
        _, _, target, backend, binder = self.create_binder()
        bound, specialization, options = binder(*args, **kwargs)
        parsed, signature, constexprs, attrs = self._pack_args(backend, kwargs, bound, specialization, options)
        cells: Any = grid(bound) if callable(grid) else grid
        assert all(size > 0 for size in cells), f"{self.__name__}: empty grid {cells}"
        launches.append(Launch(self, target.arch, tuple(cells), signature, constexprs, attrs, dict(parsed.__dict__)))

    active = driver._active
    driver.set_active(_PretendedDriver(arch))  # type: ignore[arg-type]
    try:
        with (
            mock.patch.object(JITFunction, "run", record),
            mock.patch.object(configs, "capability", return_value=divmod(arch, 10)),
            mock.patch.object(configs, "num_sms", return_value=MULTIPROCESSORS[arch]),
        ):
            yield launches
    finally:
        driver._active = active


@dataclass(frozen=True)
class Census:
    """What the compiler made of a launch."""

    name: str
    arch: int
    registers: int
    stack: int  # bytes per thread
    local: int  # bytes per thread
    shared: int  # bytes per block
    scratch: int  # bytes of global scratch memory, which the launch would have to allocate
    instructions: int
    opcodes: dict[str, int] = field(repr=False)  # instructions by opcode without its modifiers
    wgmma_waits: tuple[int, ...] = ()  # the N of every `wgmma.wait_group N` of the PTX
    ptx_atomics: int = 0
    counters: int = 0  # integer additions that order what programs store (`tiling.store_sum`)
    loop_copies: int = 0  # asynchronous copies to shared memory that a loop asks for

    def count(self, *opcodes: str) -> int:
        return sum(self.opcodes.get(opcode, 0) for opcode in opcodes)

    @property
    def spills(self) -> int:
        return self.count("STL", "LDL")

    @property
    def atomics(self) -> int:
        """Instructions that read and change memory in one go, but for counters.

        Not among them: REDUX (within a warp), SYNCS (mbarriers), and ATOMS, which is what allocating tensor memory
        becomes on sm_100; an atomic on shared memory that a kernel asks for shows in the PTX.
        """
        return self.ptx_atomics + self.count("ATOM", "ATOMG", "RED", "REDG") - 2 * self.counters

    @property
    def matrix_instructions(self) -> int:
        return self.count("HMMA", "HGMMA", "UTCHMMA", "DMMA")


_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)* (?:!?U?P\w+, )*`\((\.L_x_\d+)\)")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
_COUNTER = re.compile(r"^\s*@%\w+ atom\.global\.gpu\.acq_rel\.add\.[us]32\b", re.MULTILINE)
_PTX_ATOMIC = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:atom|red)\.", re.MULTILINE)


def copies_in_loops(sass: str) -> int:
    """LDGSTS and UTMALDG between a label and a branch back to it."""
    labels: dict[str, int] = {}
    copies: set[int] = set()
    lines = sass.splitlines()
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            inside = range(labels[branch[1]], number)
            copies |= {i for i in inside if (op := _OPCODE.match(lines[i])) and op[1] in ("LDGSTS", "UTMALDG")}
    return len(copies)


def take_census(launch: Launch) -> Census:
    """Compiles the launch and counts its instructions with the disassembler that ships with Triton."""
    compiled = launch.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    opcodes = Counter(_OPCODE.findall(sass))
    assert opcodes, f"{launch.name}: no instruction found in the disassembly"
    ptx = compiled.asm["ptx"]
    return Census(
        name=launch.name,
        arch=launch.arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        scratch=compiled.metadata.global_scratch_size,
        instructions=sum(opcodes.values()),
        opcodes=dict(opcodes),
        wgmma_waits=tuple(sorted({int(n) for n in _WAIT.findall(ptx)})),
        ptx_atomics=len(_PTX_ATOMIC.findall(ptx)),
        counters=len(_COUNTER.findall(ptx)),
        loop_copies=copies_in_loops(sass),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_queue: list[Launch] = []  # inherited by the workers, since a JITFunction cannot be pickled


def _census_of(index: int, cache: str) -> Census | str:
    with knobs.cache.scope():
        knobs.cache.dir = cache
        try:
            return take_census(_queue[index])
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def take_censuses(launches: list[Launch], cache: Path, workers: int | None = None) -> dict[str, Census | str]:
    """The census of every distinct launch, by its key; the error's text where it does not compile. Runs on every
    core."""
    distinct = {launch.key: launch for launch in launches}
    _queue[:] = distinct.values()
    workers = workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = pool.map(_census_of, range(len(_queue)), [str(cache)] * len(_queue))
        return dict(zip(distinct, results, strict=True))
