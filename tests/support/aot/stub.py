"""Triton's own JIT, launcher and tensor-map encoder on a machine without a GPU: their driver is stub_driver.c.

`install` makes this process one with a Hopper GPU on which nothing runs. CPU tensors stand for its memory: kernels are
compiled for sm_90 and "launched", so argument binding, specialisation, grid limits, shared memory, alignment and tensor
maps are the real ones, and so is the host's time. There is no way back: use a process of its own.
"""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

SOURCE = Path(__file__).with_name("stub_driver.c")
MAX_PARAMS = 128
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
TENSOR_MAP = 128  # bytes


class Launch(NamedTuple):
    """A launch as the driver saw it. params: pointers and numbers; of a tensor map a digest."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    params: tuple[int, ...]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 128),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("num_params", ctypes.c_int),
        ("params", ctypes.c_int64 * MAX_PARAMS),
    ]


def build(folder: Path) -> Path:
    """Compiles the stub to folder/libcuda.so.1."""
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-Wall", f"-I{headers}", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*command, str(library), str(SOURCE)], check=True)
    return library


class Stub:
    """The driver in this process, and what it has seen."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.library.stub_launches.restype = self.library.stub_tensor_maps.restype = ctypes.c_long

    @property
    def launches(self) -> int:
        return self.library.stub_launches()

    @property
    def tensor_maps(self) -> int:
        return self.library.stub_tensor_maps()

    def clear_log(self) -> None:
        self.library.stub_clear_log()

    def log(self) -> list[Launch]:
        """The launches since `clear_log`, 1024 at most."""
        first = ctypes.POINTER(_Launch)()
        count = self.library.stub_log(ctypes.byref(first))
        return [
            Launch(one.name.decode(), tuple(one.grid), one.threads, one.shared, tuple(one.params[: one.num_params]))
            for one in first[:count]
        ]

    def describe(self, module: Any, function: int, name: str, files: dict[str, str], digest: str) -> None:
        """A hook of Triton's, called when a kernel is loaded: says what the compiler assumed of its parameters."""
        ttir = next(Path(path).read_text() for file, path in files.items() if file.endswith(".ttir"))
        params = list(parameters(ttir))
        sizes, divisors = (bytes(column) for column in zip(*params, strict=True))
        self.library.stub_describe(ctypes.c_void_p(function), len(params), sizes, divisors)


def parameters(ttir: str) -> Iterator[tuple[int, int]]:
    """(bytes, what it is a multiple of) for every parameter of a kernel, from its first intermediate representation."""
    header = re.search(r"tt\.func public @\w+\((.*?)\) attributes", ttir, re.DOTALL)
    assert header, ttir[:500]
    # Locations may hold commas and parentheses; what is wanted does not.
    for type_, attributes in re.findall(r"%[\w.]+: ((?:!tt\.\w+<.*?>>?)|\w+)( \{[^}]*\})?", header[1]):
        divisor = re.search(r"tt\.divisibility = (\d+)", attributes)
        size = TENSOR_MAP if type_.startswith("!tt.tensordesc") else 8 if type_.startswith("!tt.") else SIZES[type_]
        yield size, int(divisor[1]) if divisor else 1


def install(folder: Path) -> Stub:
    """Makes Triton and the launchers of this process believe in one Hopper GPU."""
    library = build(folder)
    stub = Stub(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # where Triton links against it
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)

    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from fastlora.kernels import configs

    active: Any = CudaDriver()
    active.get_current_stream = lambda index: 0
    active.get_current_device = lambda: 0
    active.get_device_capability = lambda device=None: (9, 0)
    driver.set_active(active)
    knobs.runtime.kernel_load_end_hook.add(stub.describe)
    configs.capability = lambda device: (9, 0)
    configs.num_sms = lambda device: 132
    return stub
