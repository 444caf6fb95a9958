"""``python -m fastlora.tune``: measures the backends ahead, so that training starts with every choice made.

    python -m fastlora.tune --model-shapes llama-3-8b --tokens 8192 --r 16
    python -m fastlora.tune --config path/to/model --tokens 2048,8192 --r 8,64 --dropout both
    python -m fastlora.tune --shape 4096x14336 --dtype float16

The layers are those of a well-known transformer, or of any by its `config.json`, or given as (N, K), out and in
features. Tokens are those of one call of a layer: batch size × sequence length, rounded up to a power of two. Every
result is kept as soon as it is there: Ctrl-C loses the one in progress. What is in the cache already is not measured
again without ``--again``. The exit status is 0 where everything asked for has been measured, 1 where something could
not be, 2 for a wrong call or without a GPU, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastlora.introspect.shapes import MODEL_SHAPES, Shape, from_config
from fastlora.kernels import configs
from fastlora.ops.lora import choice, measure
from fastlora.runtime import cache as tuning_cache

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def example_call(key: measure.Key, device: torch.device) -> choice.Call:
    """A call of this kind, of tensors that take no memory: for what a backend asks of shapes, dtypes and devices."""

    def tensor(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1, dtype=dtype, device=device).expand(rows, columns)

    x, weight = tensor(key.M, key.K, key.dtype), tensor(key.N, key.K, key.dtype)
    lora_A, lora_B = tensor(key.r, key.K, key.adapter_dtype), tensor(key.N, key.r, key.adapter_dtype)
    return choice.Call(x, weight, None, lora_A, lora_B, 0.1 if key.dropout else 0.0)


def keys(options: argparse.Namespace) -> list[measure.Key]:
    """The distinct kinds of calls that the command line asks for, in its order."""
    dropouts = {"off": (False,), "on": (True,), "both": (False, True)}[options.dropout]
    product = itertools.product(options.shapes, options.tokens, options.r, options.adapter_dtype, dropouts)
    found = [
        measure.Key(
            measure.bucket(tokens),
            shape[0],
            shape[1],
            r,
            options.dtype,
            adapter_dtype or options.dtype,
            dropout,
            precision=configs.input_precision(options.dtype),
        )
        for shape, tokens, r, adapter_dtype, dropout in product
    ]
    return list(dict.fromkeys(found))


def tune(
    wanted: list[measure.Key], device: torch.device, again: bool = False, say: Callable[[str], object] = print
) -> int:
    """Measures what the device's cache lacks; the number of keys that could not be measured."""
    cache = tuning_cache.for_device(device)
    say(f"{cache.environment['device']}; {len(wanted)} kinds of calls; kept in {cache.path or 'this process only'}")
    failed = 0
    for number, key in enumerate(wanted, 1):
        known = None if again else cache.entries.get(str(key))
        begun = time.monotonic()
        if again:
            cache.forget(str(key))
        entry, why = choice.Resolver(example_call(key, device)).measure(key, math.inf)
        took = "known" if known is not None else f"{time.monotonic() - begun:.1f} s"
        failed += entry is None
        result = f"not measured: {why}" if entry is None else choice.describe(entry)
        say(f"[{number}/{len(wanted)}] {key} ({took}): {result}")
        for name, reason in ({} if entry is None else entry.get("left_out", {})).items():
            if known is None:
                say(f"    without {name}: {reason}")
    if cache.unwritable is not None:
        say(f"NOT KEPT: {cache.path} cannot be written: {cache.unwritable}; set FASTLORA_CACHE_DIR to a place that can")
    return failed + (cache.unwritable is not None)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.tune", description="Measure fastlora's backends on this GPU, ahead of training."
    )
    known = ", ".join(MODEL_SHAPES)
    parser.add_argument("--model-shapes", type=_names, default=[], metavar="MODEL,...", help=f"of {known}")
    parser.add_argument("--config", action="append", default=[], metavar="PATH", help="config.json, or its directory")
    parser.add_argument(
        "--shape", type=_shapes, default=[], metavar="KxN,...", help="in and out features, as 4096x14336"
    )
    parser.add_argument("--tokens", type=_integers, default=[8192], metavar="M,...", help="of one call (default: 8192)")
    parser.add_argument("--r", type=_integers, default=[16], metavar="R,...", help="ranks (default: 16)")
    parser.add_argument("--dtype", type=_dtype, default=torch.bfloat16, help="of the model (default: bfloat16)")
    parser.add_argument(
        "--adapter-dtype",
        type=lambda text: [_dtype(part) for part in text.split(",")],
        default=[torch.float32, None],
        metavar="DTYPE,...",
        help="of A and B (default: float32, which patch gives a half-precision model, and the model's)",
    )
    parser.add_argument("--dropout", choices=("off", "on", "both"), default="off", help="(default: off)")
    parser.add_argument("--again", action="store_true", help="measure what is in the cache too")
    parser.add_argument("--device", type=torch.device, default="cuda", help="cpu: a rehearsal, by the wall clock")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything that the cache then holds there too"
    )
    options = parser.parse_args(given)
    shapes = list(options.shape)
    try:
        for name in options.model_shapes:
            if name not in MODEL_SHAPES:
                raise ValueError(f"--model-shapes: got {name!r}, want of {known}; others by --config or --shape")
            shapes += MODEL_SHAPES[name]
        for path in options.config:
            shapes += from_config(path)
        if not shapes:
            raise ValueError("nothing to measure: want --model-shapes, --config or --shape")
    except ValueError as error:
        parser.error(str(error))
    options.shapes = list(dict.fromkeys(shapes))
    return options


def _names(text: str) -> list[str]:
    return [name.strip().lower() for name in text.split(",") if name.strip()]


def _integers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want positive integers")
    return found


def _shapes(text: str) -> list[Shape]:
    def shape(part: str) -> Shape:
        k, n = (_integers(number)[0] for number in part.lower().split("x"))
        return n, k

    return [shape(part) for part in text.split(",")]


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"got {text!r}, want one of {', '.join(DTYPES)}")
    return DTYPES[text]


def _device(device: torch.device) -> torch.device | None:
    """With its index, or None for a GPU where there is none."""
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def contents(cache: tuning_cache.TuningCache) -> dict[str, Any]:
    return {"version": tuning_cache.VERSION, "environment": cache.environment, "entries": dict(cache.entries)}


def main(given: list[str] | None = None) -> int:
    """Measure and print a line per kind of call; the exit status."""
    options = arguments(given)
    device = _device(options.device)
    if device is None:
        print(
            "fastlora.tune: torch sees no GPU here, so there is nothing to measure: on a CPU the torch backend always "
            "runs.\nRun this on the machine that trains, or point FASTLORA_CACHE_DIR at a folder that both can see; "
            "`python -m fastlora.doctor` says why no GPU was found.",
            file=sys.stderr,
        )
        return 2

    def say(text: str) -> None:
        print(text, flush=True)

    cache, status = tuning_cache.for_device(device), 0
    try:
        status = 1 if tune(keys(options), device, options.again, say) else 0
    except KeyboardInterrupt:
        say("interrupted: what was measured is kept")
        status = 130
    if options.json is not None:
        options.json.write_text(json.dumps(contents(cache), indent=1) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
