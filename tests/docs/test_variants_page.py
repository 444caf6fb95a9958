"""The pages of the comparison say what the committed results say: their tables are written from them again."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from study import alignment
from study import report as comparison_report
from study.report import Row, Spread
from study.tasks.digits import DigitsTask
from study.tasks.docstrings import DocstringsTask
from study.tasks.gpt import GptTask

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "details" / "variants.md").read_text(encoding="utf-8")
RESULTS = {path.stem.removeprefix("compare_"): path for path in (ROOT / "bench/results/cpu").glob("compare_*.json")}
SPREADS = {"final_loss", "validation_loss", "test", "beside_baseline"}
METRICS = {"docstrings": DocstringsTask.metric, "gpt": GptTask.metric, "digits": DigitsTask.metric}


def rows_of(found: list[dict[str, Any]]) -> list[Row]:
    spreads = [{name: Spread(*row[name]) for name in SPREADS if row[name] is not None} for row in found]
    return [Row(**{**row, **read}) for row, read in zip(found, spreads, strict=True)]


def test_every_task_has_its_results():
    assert set(RESULTS) == {"docstrings", "gpt", "digits", "gpt-sgd", "digits-sgd"}


def test_the_tables_are_those_of_the_results():
    results = json.loads(RESULTS["docstrings"].read_text(encoding="utf-8"))
    best = rows_of(results["best rates"])
    wanted = [
        comparison_report.table(best, METRICS["docstrings"]),
        alignment.table(results["alignment"]),
        *(commit.removesuffix("-dirty") for commit in results["commits"]),
        results["machine"]["device"],
    ]
    for text in wanted:
        assert text in PAGE


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name, column", [("docstrings", 1), ("gpt", 2), ("digits", 3)])
def test_the_summary_has_the_best_rates(name, column):
    best = rows_of(json.loads(RESULTS[name].read_text(encoding="utf-8"))["best rates"])
    summary = {cells(line)[0]: cells(line) for line in SUMMARY.splitlines() if line.startswith("| ")}
    for line in comparison_report.table(best, METRICS[name]).splitlines()[2:]:
        method, test, beside = (cells(line)[number] for number in (0, 5, 6))
        spread = beside[beside.index("(") :] if beside else ""
        assert summary[method][column].endswith(f"{test.split(' (')[0]} {spread}".strip())
