"""``python -m fastlora.doctor``: what this installation is, what it can run, and why not the rest.

It prints versions, the machine, the compilers, each backend as "available" or "unavailable: why", the compiled ops, the
``FASTLORA_*`` variables and the cache, and then compares every available backend with the fp64 reference on a small
problem (about a second on a CPU). The exit status is 1 where a check failed, 0 otherwise. A section that cannot be
determined says so and does not keep the others from being printed.

``--memory llama-3-8b`` prints instead what training LoRA on a model takes, counted from its sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastlora.introspect import shapes
from fastlora.linalg import native
from fastlora.ops import dropout, reference
from fastlora.ops.lora import choice as lora_choice
from fastlora.ops.lora import linear as lora_op
from fastlora.runtime import build as runtime_build
from fastlora.runtime import compiled, env

PACKAGES = ("torch", "triton", "peft", "transformers", "safetensors", "numpy")
BACKENDS = tuple(name for name in env.BACKENDS if name != "auto")
HERE = Path(__file__).resolve().parent


class Line(NamedTuple):
    """One printed line; ``ok`` False makes the exit status 1."""

    label: str
    text: str
    ok: bool = True


def _run(*command: str) -> str | None:
    """A command's standard output, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> Iterator[Line]:
    yield Line("python", f"{platform.python_version()} ({sys.executable})")
    try:
        text = importlib.metadata.version("fastlora")
    except importlib.metadata.PackageNotFoundError:
        text = "not installed, imported from a folder"
    yield Line("fastlora", f"{text} ({HERE}{_commit()})")
    for name in PACKAGES:
        try:
            yield Line(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Line(name, "not installed")


def _commit() -> str:
    root = HERE.parent
    if not (root / ".git").exists():
        return ""
    commit = _run("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    if commit is None:
        return ", a checkout whose commit git does not tell"
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f", commit {commit}{' with changes' if changed else ''}"


def machine() -> Iterator[Line]:
    yield Line("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    name = platform.processor() or "unknown"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    yield Line("cpu", f"{name}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    if torch.cuda.is_available():
        driver = (_run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown").split("\n")[0]
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = f"{found.total_memory / 2**30:.0f} GiB"
            text = f"{found.name}, capability {found.major}.{found.minor}, {memory}, driver {driver}"
            yield Line(f"gpu {index}", f"{text}, torch's CUDA {torch.version.cuda}")
    else:
        yield Line("gpu", f"none: {_why_no_gpu()}")


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if shutil.which("nvidia-smi") is None:
        return f"torch has CUDA {torch.version.cuda}, but there is no NVIDIA driver (no nvidia-smi)"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).strip().split("\n")[0]
    return f"torch has CUDA {torch.version.cuda} and sees no device (CUDA_VISIBLE_DEVICES?)"


def compiled_ops(build: bool) -> Iterator[Line]:
    try:
        toolchain = runtime_build.find_toolchain()
    except runtime_build.Unavailable as why:
        toolchain = None
        yield Line("compilers", f"none: {why}")
    else:
        nvcc = toolchain.nvcc or f"none: {toolchain.why_no_nvcc}"
        release = (_run(toolchain.nvcc or "nvcc", "--version") or "").partition("release ")[2].partition(",")[0]
        yield Line("nvcc", f"{nvcc}{f' (CUDA {release})' if release else ''}")
        yield Line("c++", toolchain.gxx)
    path = runtime_build.find(toolchain)
    if path is None and not (build and toolchain is not None):
        how = "cannot be built here" if toolchain is None else f"would be: {toolchain.variant}"
        hint = "" if toolchain is None else "; compiled at first use, or now with --build"
        yield Line("csrc ops", f"not built ({how}{hint})")
        return
    try:
        path = compiled.load()
        failure = _mask_differs()
    except runtime_build.Unavailable as why:
        yield Line("csrc ops", f"unavailable: {why}", ok=False)
        return
    state = "loads, and its dropout mask is right" if failure is None else f"WRONG: {failure}"
    yield Line("csrc ops", f"{path}: {state}", ok=failure is None)
    device = _device() if toolchain is not None and toolchain.nvcc else torch.device("cpu")
    failure = native.check(device)
    state = f"right on {device.type}" if failure is None else f"WRONG on {device.type}: {failure}"
    yield Line("csrc linalg", state, ok=failure is None)


def linear_algebra() -> Iterator[Line]:
    """Which implementation the sketches and the small SVDs take on this machine's first device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failed check warns; here it becomes the reason
        why = native.why_not(_device())
    yield Line("linalg", "compiled, csrc/" if why is None else f"torch: {why}")


def _mask_differs() -> str | None:
    """None, or how the op's dropout mask differs from the specification on the first device there is."""
    try:
        specification = importlib.import_module("fastlora.kernels.dropout")
    except ImportError:  # no Triton: nothing to compare with, and no kernel whose mask it could be
        return None
    seed = torch.tensor([20250101])
    expected = specification.reference_keep_mask(seed, 33, 70, 0.25)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() and runtime_build.find_toolchain().nvcc else ["cpu"]
    for device in devices:
        if not torch.equal(dropout.dropout_keep_mask(seed.to(device), 33, 70, 0.25).cpu(), expected):
            return f"on {device} the mask is not the kernels'"
    return None


class Problem(NamedTuple):
    """A small problem whose sizes divide nothing, and what the fp64 reference says of it."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    dy: torch.Tensor
    scaling: float = 1.5


def _problem(dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    M, K, N, r = 515, 264, 88, 6  # x is large enough for the fused path (call.SMALL), where a CPU has a plain one too

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors = normal(M, K), normal(N, K) * K**-0.5, normal(N), normal(r, K) * K**-0.5, normal(N, r) * r**-0.5
    return Problem(*tensors, normal(M, N))


def _results(problem: Problem, layer: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the gradients of x, lora_A and lora_B, in fp64."""
    x, lora_A, lora_B = (tensor.to(dtype).requires_grad_() for tensor in (problem.x, problem.lora_A, problem.lora_B))
    y = layer(x, problem.weight.to(dtype), lora_A, lora_B, problem.scaling, problem.bias.to(dtype))
    gradients = torch.autograd.grad(y, (x, lora_A, lora_B), problem.dy.to(dtype))
    return [tensor.detach().double() for tensor in (y, *gradients)]


def _errors(got: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected)]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backend_states() -> dict[str, str | None]:
    """For each backend None where it takes an ordinary call on this machine's first device, or why it does not."""
    device = _device()
    p = _problem(torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    states = {}
    for name in BACKENDS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a failed self-check warns; here it becomes the reason
                choice = lora_choice.select(p.x, p.weight, p.bias, p.lora_A, p.lora_B, 0.0, backend=name)
            found = [reason for reason in choice.reason.split("; ") if reason.startswith(f"{name}: ")]
            states[name] = None if choice.name == name else (found[0].partition(": ")[2] if found else choice.reason)
        except Exception as error:
            states[name] = f"{type(error).__name__}: {error}"
    return states


def backends() -> Iterator[Line]:
    for name, why in backend_states().items():
        yield Line(name, "available" if why is None else f"unavailable: {why}")


def variables() -> Iterator[Line]:
    found = False
    for name, variable in env.VARIABLES.items():
        if not os.environ.get(name):
            continue
        found = True
        try:
            env.get(name)
        except ValueError as error:
            yield Line(name, f"BAD VALUE: {error}", ok=False)
        else:
            yield Line(name, f"{os.environ[name]} ({variable.meaning})")
    for name, close in env.unknown().items():
        found = True
        hint = f"; did you mean {close}?" if close else f"; known are {', '.join(env.VARIABLES)}"
        yield Line(name, f"WARNING: fastlora does not know this name{hint}")
    if not found:
        yield Line("FASTLORA_*", "none set")


def caches() -> Iterator[Line]:
    folder = env.cache_dir()
    yield Line("cache", f"{folder} ({_writable(folder)})")


def _writable(folder: Path) -> str:
    """Whether files can be made in a folder, or in the closest parent that exists (nothing is left behind)."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return f"not writable: {error.strerror or error}; set FASTLORA_CACHE_DIR to a place that is"
    return "writable" if existing == folder else "not there yet, can be made"


def self_check() -> Iterator[Line]:
    device = _device()
    for name, why in backend_states().items():
        if why is not None:
            continue
        interpreted = name != "torch" and device.type == "cpu"  # Triton's interpreter, whose bf16 products are wrong
        for dtype in (torch.float32,) if interpreted else (torch.float32, torch.bfloat16):
            yield _compare(name, dtype, device)
        failure = lora_choice.self_check(lora_choice.load(name), device, torch.float32, torch.float32, dropout=True)
        yield Line(f"{name} dropout", "right" if failure is None else f"FAILED: {failure}", ok=failure is None)


def _compare(name: str, dtype: torch.dtype, device: torch.device) -> Line:
    """One backend against the fp64 reference: at most twice eager PyTorch's error plus one ulp, each gradient alike."""
    label = f"{name} {str(dtype).partition('.')[2]}"

    def layer(x, weight, lora_A, lora_B, scaling, bias):
        return lora_op.lora_linear(x, weight, lora_A, lora_B, scaling, bias, backend=name)

    problem = _problem(dtype, device)
    expected = _results(problem, reference.lora_linear, torch.float64)
    errors = _errors(_results(problem, layer, dtype), expected)
    eager = _errors(_results(problem, reference.lora_linear, dtype), expected)
    allowed = [2 * error + torch.finfo(dtype).eps for error in eager]
    ok = all(error <= bound for error, bound in zip(errors, allowed))
    pairs = ", ".join(f"{what} {a:.1e} ({b:.1e})" for what, a, b in zip(("y", "dx", "dA", "dB"), errors, eager))
    return Line(label, f"{'right' if ok else 'FAILED'}: relative errors (eager's) {pairs}", ok)


def memory(model: str, tokens: int, r: int) -> Iterator[str]:
    """A Markdown table: the GiB of a LoRA training step of a known model, or of one by its config.json."""
    known = shapes.MODELS.get(model.lower())
    if known is None and not Path(model).exists():
        names = ", ".join(name for name, config in shapes.MODELS.items() if "vocab_size" in config)
        raise ValueError(f"got {model!r}, want one of {names}, or the path of a config.json")
    config = known or shapes.read_config(model)
    yield f"| {model}, {tokens} tokens, r = {r} | weights | adapters | activations | temporary | GiB in all |"
    yield "|---|---:|---:|---:|---:|---:|"
    for bits, checkpointing, fused_loss in itertools.product((16, 4), (False, True), (False, True)):
        found = shapes.training_memory(config, tokens, r, bits, checkpointing, fused_loss, where=model)
        name = f"{bits} bits{', checkpointing' * checkpointing}{', fused_loss' * fused_loss}"
        yield f"| {name} | " + " | ".join(f"{number / 2**30:.1f}" for number in (*found, found.total)) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastlora.doctor", description="The state of this installation.")
    parser.add_argument("--build", action="store_true", help="compile csrc/ now, if it is not yet")
    parser.add_argument(
        "--memory", metavar="MODEL", help="count a training step's memory instead: a name or a config.json"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="with --memory: of a step (default: 4096)")
    parser.add_argument("--r", type=int, default=16, help="with --memory: the rank (default: 16)")
    options = parser.parse_args(arguments)
    if options.memory:
        try:
            print("\n".join(memory(options.memory, options.tokens, options.r)))
        except ValueError as error:
            parser.error(f"--memory: {error}")
        return 0
    sections: list[tuple[str, Callable[[], Iterator[Line]]]] = [
        ("versions", versions),
        ("machine", machine),
        ("backends", backends),
        ("compiled ops", lambda: compiled_ops(options.build)),
        ("linear algebra", linear_algebra),
        ("environment", variables),
        ("cache", caches),
        ("self-check", self_check),
    ]
    failures = 0
    for title, section in sections:
        print(title)
        try:
            for line in section():
                print(f"  {line.label:<16} {line.text}", flush=True)
                failures += not line.ok
        except Exception as error:
            print(f"  could not be determined: {type(error).__name__}: {error}")
            failures += title == "self-check"
    print(f"{failures} check{'s' * (failures != 1)} failed" if failures else "all checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
