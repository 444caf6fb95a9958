"""What a result was measured on, and the roof there, measured in the same run."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .counting import Roof
from .timing import Timer

ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, driver, versions and commit: what a number means nothing without."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "fastlora_commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def measure_roof(device: torch.device, dtype: str, timer: Timer) -> Roof:
    """The rate of a large square matrix product and the bandwidth of a large copy (reads plus writes), on random
    data."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    nbytes = 2**31 if device.type == "cuda" else 2**26
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    samples = timer.interleaved(
        {"gemm": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}, rounds=10
    )
    gemm, copy = (sorted(samples[name])[len(samples[name]) // 2] for name in ("gemm", "copy"))
    return Roof(flops=2 * size**3 / gemm, bandwidth=2 * nbytes / copy, name=f"measured, {dtype}")


def slug(facts: dict[str, Any]) -> str:
    """A folder's name for results: the GPU's name, or cpu."""
    name = facts.get("gpu", "cpu").lower().replace("nvidia ", "")
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _commit() -> str | None:
    """The commit, with "+" where tracked files differ from it."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
