"""Compile ``csrc/`` into one shared object, once per machine, and find it again.

``csrc/`` uses PyTorch's stable ABI only, so the object depends neither on the Python nor on the torch that is installed
(2.11 or later): it is keyed by the sources, the targeted torch version, the compilers' variant and the GPUs it is
compiled for. With nvcc it holds the CPU and the CUDA implementations, without nvcc only the CPU's. It is looked for

1. in the package, where ``FASTLORA_BUILD_CUDA=1 pip install --no-build-isolation .`` put it;
2. in ``<cache directory>/csrc``, where the first use of an op compiles it (half a minute with nvcc, five seconds
   without).

Several processes may ask at once: a file lock lets one of them compile, and the result appears by a rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import env

TORCH_TARGET = (2, 11)
OBJECT_NAME = "fastlora_ops.so"
COMPILE_TIMEOUT_S = 900

_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = _PACKAGE / "csrc"
_PREBUILT = _PACKAGE / "_prebuilt"


class Unavailable(RuntimeError):
    """The ops of ``csrc/`` cannot be used here; the message says why."""


@dataclass(frozen=True)
class Toolchain:
    """The compilers found. ``nvcc`` is None where there is none, or none that fits; ``why_no_nvcc`` says which."""

    gxx: str
    nvcc: str | None
    archs: tuple[str, ...]  # what nvcc will compile for; empty without nvcc
    why_no_nvcc: str | None = None

    @property
    def variant(self) -> str:
        return f"CPU and CUDA ({', '.join('sm_' + arch for arch in self.archs)})" if self.nvcc else "CPU only"


def find_toolchain() -> Toolchain:
    """The compilers on this machine. Raises :class:`Unavailable` where there is no C++ compiler for Linux."""
    if sys.platform != "linux":
        raise Unavailable(f"csrc/ is built on Linux only, and this is {platform.system() or sys.platform}")
    gxx = shutil.which(os.environ.get("CXX", "g++"))
    if gxx is None:
        raise Unavailable(f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on PATH (install g++ 11 or later)")
    nvcc = _find_nvcc()
    if nvcc is None:
        return Toolchain(gxx, None, (), "nvcc is neither under CUDA_HOME, nor on PATH, nor in /usr/local/cuda/bin")
    known = _nvcc_architectures(nvcc)
    archs = tuple(arch for arch in env.cuda_archs() if arch.rstrip("af") in known)
    if not archs:
        listed = ", ".join(sorted(known)) or "nothing"
        why = f"{nvcc} compiles for {listed}, and FASTLORA_CUDA_ARCHS asks for none of those"
        return Toolchain(gxx, None, (), why)
    return Toolchain(gxx, nvcc, archs)


def _find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in (*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found is not None:
            return found
    return None


@cache
def _nvcc_architectures(nvcc: str) -> frozenset[str]:
    """Compute capabilities that this nvcc knows, such as {"80", "90", "100"}; empty where it cannot be asked."""
    try:
        listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(word[3:] for word in listing.stdout.split() if word.startswith("sm_"))


def key(toolchain: Toolchain) -> str:
    """What the object depends on, as 20 hexadecimal digits."""
    digest = hashlib.sha256()
    parts = [f"torch {TORCH_TARGET}", platform.machine(), "cuda" if toolchain.nvcc else "cpu", *toolchain.archs]
    for path in sorted(_SOURCES.iterdir()):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            parts += [path.name, path.read_text(encoding="utf-8")]
    for part in parts:
        text = part.encode()
        digest.update(b"%d:%s" % (len(text), text))
    return digest.hexdigest()[:20]


def find(toolchain: Toolchain | None = None) -> Path | None:
    """The object that :func:`build` would return without compiling anything, or None."""
    prebuilt = _PREBUILT / OBJECT_NAME
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads((_PREBUILT / "stamp.json").read_text())
        wanted = key(Toolchain("", "nvcc" if stamp["archs"] else None, tuple(stamp["archs"])))
        if stamp["key"] == wanted and prebuilt.is_file():
            return prebuilt
    if toolchain is None:
        return None
    cached = env.cache_dir() / "csrc" / key(toolchain) / OBJECT_NAME
    return cached if cached.is_file() else None


def build() -> Path:
    """The path of the shared object, compiled now if it is not there. Raises :class:`Unavailable`."""
    found = find()
    if found is not None:
        return found
    toolchain = find_toolchain()
    folder = env.cache_dir() / "csrc" / key(toolchain)
    target = folder / OBJECT_NAME
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not target.is_file():  # another process may have made it while this one waited
                compile_into(target, toolchain)
    except OSError as error:
        raise Unavailable(f"the compiled ops cannot be kept in {folder}: {error} (see FASTLORA_CACHE_DIR)") from error
    return target


def prebuild(package: Path) -> None:
    """Compile into ``package/_prebuilt``: what ``setup.py`` does under FASTLORA_BUILD_CUDA=1."""
    toolchain = find_toolchain()
    if toolchain.nvcc is None:
        raise Unavailable(f"FASTLORA_BUILD_CUDA=1 needs nvcc: {toolchain.why_no_nvcc}")
    folder = package / "_prebuilt"
    folder.mkdir(parents=True, exist_ok=True)
    compile_into(folder / OBJECT_NAME, toolchain)
    (folder / "stamp.json").write_text(json.dumps({"key": key(toolchain), "archs": toolchain.archs}) + "\n")


def compile_into(target: Path, toolchain: Toolchain) -> None:
    """Compile ``csrc/`` and rename the result to ``target``, so that nobody ever sees half an object."""
    with tempfile.TemporaryDirectory(prefix="fastlora-csrc-") as scratch:
        made = Path(scratch) / OBJECT_NAME
        *compile_calls, link = commands(toolchain, Path(scratch), made)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compile_calls))
        _run(link)
        descriptor, temporary = tempfile.mkstemp(prefix=".building-", dir=target.parent)
        os.close(descriptor)
        try:
            shutil.copyfile(made, temporary)
            os.chmod(temporary, 0o755)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise


def commands(toolchain: Toolchain, scratch: Path, target: Path) -> list[list[str]]:
    """The compiler calls that make ``target``, with their intermediate files in ``scratch``; the last one links."""
    torch_folder = _torch_folder()
    version = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
    common = ["-std=c++20", f"-DTORCH_TARGET_VERSION={version:#018x}ULL", f"-I{torch_folder / 'include'}"]
    calls: list[list[str]] = []
    objects: list[str] = []
    for source in sorted(_SOURCES.glob("*.cpp")):
        objects.append(str(scratch / f"{source.name}.o"))
        flags = ["-O2", "-fPIC", "-fvisibility=hidden", "-Wall"]
        calls.append([toolchain.gxx, *common, *flags, "-c", str(source), "-o", objects[-1]])
    link = ["-shared", "-o", str(target), f"-L{torch_folder / 'lib'}"]
    if toolchain.nvcc is None:
        calls.append([toolchain.gxx, *objects, *link, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"])
        return calls
    host = [toolchain.nvcc, "-ccbin", toolchain.gxx]
    for source in sorted(_SOURCES.glob("*.cu")):
        objects.append(str(scratch / f"{source.name}.o"))
        flags = ["-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode(toolchain.archs)]
        calls.append([*host, *common, *flags, "-c", str(source), "-o", objects[-1]])
    calls.append([*host, *objects, *link, "-cudart", "static", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"])
    return calls


def gencode(archs: Sequence[str]) -> list[str]:
    """nvcc's options for these GPUs; the oldest also as PTX, from which the driver serves GPUs that are not listed."""
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = sorted((arch for arch in archs if arch.isdigit()), key=int)
    if plain:
        options.append(f"-gencode=arch=compute_{plain[0]},code=compute_{plain[0]}")
    return options


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable(
            "torch is not importable, and csrc/ is compiled against its headers (use --no-build-isolation)"
        )
    return Path(spec.origin).parent


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        shown = "\n".join(lines[-30:])
        raise Unavailable(f"{command[0]} failed (exit status {error.returncode}):\n{shown}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} could not be run: {error}") from error


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Holds an exclusive lock between processes, which ends with its owner. It goes on without after `timeout` seconds,
    and on file systems that have no locks: two processes then do the same work, and renaming keeps the result whole."""
    from filelock import FileLock, Timeout  # not at the top: an isolated build imports this file without it

    with contextlib.ExitStack() as held:
        with contextlib.suppress(Timeout, NotImplementedError, OSError):
            held.enter_context(FileLock(path, timeout))
        yield
