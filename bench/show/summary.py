"""One line per measured case of a folder of results: `python -m bench summary bench/results/h200`.

Each line: the frozen layer's forward + backward, and how much each contender takes over it; in brackets what counting
bytes and FLOPs predicts for the roof of that run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .plot import label


def lines(record: dict[str, Any]) -> list[str]:
    found = []
    for case in record["cases"]:
        results = case["results"]
        name = " ".join(label(case).split())
        if "frozen" not in results:
            found.append(f"{name}: not measured: {', '.join(case['unavailable'].values())[:150]}")
            continue
        floor = results["frozen"]["both"]["median"]
        others = []
        for other, entry in results.items():
            predicted = entry["both"].get("predicted_over_frozen")
            share = f" ({100 * (predicted - 1):+.0f}%)" if predicted else ""
            if other != "frozen":
                others.append(f"{other} {100 * (entry['both']['median'] / floor - 1):+.1f}%{share}")
        failed = [other for other, why in case["unavailable"].items() if why.startswith("failed")]
        others += [f"{other} FAILED" for other in failed]
        found.append(f"{name}: frozen {1e3 * floor:.3f} ms | " + " ".join(others))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench summary", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    found = 0
    for path in sorted(options.folder.glob("*.json")):
        record = json.loads(path.read_text())
        if not isinstance(record.get("cases"), list) or not all("unavailable" in case for case in record["cases"]):
            continue  # a record of another kind
        found += 1
        machine = record["machine"]
        print(f"{path.name}: {machine.get('gpu') or machine['cpu']}, commit {machine['fastlora_commit']}")
        print("\n".join(f"  {line}" for line in lines(record)))
    if not found:
        parser.error(f"folder: got {options.folder}, want one with JSON of bench lora_linear or bench suite")
    return 0
