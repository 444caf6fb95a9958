"""Every backend's first-use self-check on this machine, one line each: `python -m bench.self_checks`.

They are the checks that the dispatcher makes before it trusts a hand-written kernel; here their verdicts are printed,
and the exit status is 1 where one fails.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from fastlora import dispatch

DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.self_checks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="torch,cublas,triton", help="comma-separated (default: all)")
    parser.add_argument("--only-fp32", action="store_true", help="skip the other dtypes")
    options = parser.parse_args(arguments)
    device, failed = torch.device(options.device), 0
    for name in options.backends.split(","):
        for dtype, adapter_dtype in DTYPES[-1:] if options.only_fp32 else DTYPES:
            for dropout in (False, True):
                begun = time.monotonic()
                try:
                    failure = dispatch.self_check(dispatch.load(name), device, dtype, adapter_dtype, dropout)
                except Exception as error:
                    failure = f"{type(error).__name__}: {error}"
                failed += failure is not None
                kind = f"{dtype} x, {adapter_dtype} adapters, dropout {'on' if dropout else 'off'}".replace(
                    "torch.", ""
                )
                verdict = "passed" if failure is None else f"FAILED: {failure}"
                print(f"{name:<8}{kind:<52}{verdict} ({time.monotonic() - begun:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
