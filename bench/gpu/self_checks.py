"""Every backend's first-use self-check on this machine, one line each: `python -m bench self_checks`.

They are the checks that the dispatcher makes before it trusts a hand-written kernel; here their verdicts are printed,
and the exit status is 1 where one fails. Most of the time goes into compiling, so `--jobs` runs them in several
processes, which leaves the compiled code in Triton's cache for whatever runs next.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import time

import torch

from fastlora.ops.lora import choice

DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]


def check(device: str, name: str, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool) -> tuple[bool, str]:
    """Whether it passed (or does not apply), and a line that says so."""
    begun = time.monotonic()
    kind = f"{dtype} x, {adapter_dtype} adapters, dropout {'on' if dropout else 'off'}".replace("torch.", "")
    failure = None
    if name == "triton_s_inside" and (dropout or dtype == torch.float32 or adapter_dtype != dtype):
        return True, f"{name:<16}{kind:<52}does not apply"
    try:
        failure = choice.self_check(choice.load(name), torch.device(device), dtype, adapter_dtype, dropout)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    verdict = "passed" if failure is None else f"FAILED: {failure}"
    return failure is None, f"{name:<16}{kind:<52}{verdict} ({time.monotonic() - begun:.1f} s)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench self_checks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="torch,cublas,triton,triton_s_inside", help="comma-separated")
    parser.add_argument("--only-fp32", action="store_true", help="skip the other dtypes")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1, this one)")
    options = parser.parse_args(arguments)
    tasks = [
        (options.device, name, *dtypes, dropout)
        for dtypes in (DTYPES[-1:] if options.only_fp32 else DTYPES)
        for dropout in (False, True)
        for name in options.backends.split(",")
    ]
    failed = 0
    if options.jobs <= 1:
        results = (check(*task) for task in tasks)
        for passed, line in results:
            failed += not passed
            print(line, flush=True)
        return 1 if failed else 0
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(min(options.jobs, len(tasks)), context) as pool:
        for passed, line in pool.map(check, *zip(*tasks)):
            failed += not passed
            print(line, flush=True)
    return 1 if failed else 0
