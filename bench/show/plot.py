"""Draws a results file: `python -m bench plot bench/results/cpu/lora_linear.json`. It needs the JSON alone, and
matplotlib.

Left, forward + backward over the frozen layer's time, one group of bars per case. Right, each measurement under the
roof that was measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..harness.counting import Problem, Roof, compulsory_bytes, useful_flops


def label(case: dict[str, Any]) -> str:
    """What stands under a group of bars."""
    facts = case.get("problem") or case["facts"]
    kinds = facts["dtype"] if facts["dtype"] == facts["adapter_dtype"] else f"{facts['dtype']}+{facts['adapter_dtype']}"
    kinds = kinds.replace("bfloat16", "bf16").replace("float32", "fp32")
    if "problem" in case:
        return f"{facts['k']}→{facts['n']}\nM={facts['m']}, {kinds}\np={facts['dropout']}"
    what = facts.get("model") or facts.get("name") or f"{facts['hidden']}→{facts['intermediate']}"
    m = facts["m"] if "m" in facts else facts["sequences"] * facts["tokens"]
    return f"{facts['form']}\n{what}\nM={m}, {kinds}\np={facts['dropout']}"


def legend(name: str) -> str:
    return f"fastlora ({name})" if name in ("auto", "torch", "cublas", "triton", "triton_s_inside") else name


def work(case: dict[str, Any], both: dict[str, Any]) -> tuple[int, int]:
    """(FLOPs, bytes) that forward + backward must do."""
    if "flops" in both:
        return both["flops"], both["bytes"]
    problem = Problem(**case["problem"])  # a file from before they were written down
    return useful_flops(problem, "both"), compulsory_bytes(problem, "both")


def draw(record: dict[str, Any], target: Path) -> None:
    """Writes the picture of `record` (what bench lora_linear or bench suite wrote) to `target`, in its suffix's
    format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = record["cases"]
    if not cases:
        raise ValueError("draw: the record has no cases")
    names = list(dict.fromkeys(name for case in cases for name in case["results"]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors * 2))  # type: ignore[attr-defined]
    figure, (bars, roofline) = plt.subplots(
        1, 2, figsize=(6 + 1.6 * len(cases), 5.5), width_ratios=[max(2, len(cases)), 3]
    )
    _draw_bars(bars, cases, names, colours)
    _draw_roofline(roofline, record, names, colours)
    machine = record["machine"]
    what = "LoRA linear" if "problem" in cases[0] else "LoRA layers together, and whole models"
    figure.suptitle(
        f"{what}, forward + backward, on {machine.get('gpu') or machine['cpu']}"
        f"\n(torch {machine['torch']}, triton {machine['triton']}, commit {machine['fastlora_commit']})"
    )
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def _draw_bars(axes, cases, names, colours) -> None:
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [i for i, case in enumerate(cases) if name in case["results"] and "frozen" in case["results"]]
        floors = [cases[i]["results"]["frozen"]["both"]["median"] for i in places]
        both = [cases[i]["results"][name]["both"] for i in places]
        heights = [entry["median"] / floor for entry, floor in zip(both, floors)]
        spread = [
            [(entry["median"] - entry["p20"]) / floor for entry, floor in zip(both, floors)],
            [(entry["p80"] - entry["median"]) / floor for entry, floor in zip(both, floors)],
        ]
        offsets = [i - 0.4 + (index + 0.5) * width for i in places]
        axes.bar(
            offsets, heights, width, yerr=spread, label=legend(name), color=colours[name], error_kw={"linewidth": 0.8}
        )
    axes.set_xticks(range(len(cases)), [label(case) for case in cases], fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("time over the frozen layer's (median; 20th to 80th percentile)")
    axes.legend(fontsize=8)


def _draw_roofline(axes, record, names, colours) -> None:
    for dtype, values in record["roofs"].items():
        roof = Roof(**values)
        ridge = roof.flops / roof.bandwidth
        intensities = [ridge / 64, ridge, ridge * 64]
        heights = [min(roof.flops, intensity * roof.bandwidth) / 1e12 for intensity in intensities]
        axes.plot(intensities, heights, color="black", linewidth=1)
        axes.annotate(dtype, (intensities[-1], heights[-1]), fontsize=8, ha="right", va="bottom")
    for name in names:
        points = []
        for case in record["cases"]:
            if name in case["results"]:
                both = case["results"][name]["both"]
                flops, nbytes = work(case, both)
                points.append((flops / nbytes, flops / both["median"] / 1e12))
        axes.scatter(*zip(*points), s=18, color=colours[name], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that must move")
    axes.set_ylabel("TFLOP/s that had to be done")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("json", type=Path, help="what python -m bench lora_linear or bench suite wrote")
    parser.add_argument("--out", type=Path, help="the picture (default: the JSON's name with .png)")
    options = parser.parse_args(arguments)
    if not options.json.is_file():
        parser.error(f"json: got {options.json}, want a file that python -m bench lora_linear or bench suite wrote")
    target = options.out or options.json.with_suffix(".png")
    draw(json.loads(options.json.read_text()), target)
    print(f"written: {target}")
    return 0
