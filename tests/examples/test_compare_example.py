"""The comparison: its curves, its search for learning rates, the file of trials, whole runs on small models."""

import json
import math
import re
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import compare
from safetensors import SafetensorError
from study import curves, trials
from study import report as comparison_report
from study.contestants import CONTESTANTS
from study.data import docstrings, functions, topics
from study.data.byte_gpt import Shape
from study.settings import COMPARISON, INTERRUPTED, QUICK, UsageError, parse_comparison
from study.tasks import gpt as task_gpt
from study.tasks.task import ACCURACY, Scores
from study.trials import Store, Trial, Validation
from tiny_examples import save_tiny_encoder, save_tiny_language_model, write_functions, write_library

SIZES = {"steps": 4, "batch-size": 8, "max-length": 16, "r": 4, "sketch-batches": 1, "timed-rounds": 1, "device": "cpu"}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny_encoder"))


@pytest.fixture
def run(tiny_encoder, tmp_path, monkeypatch):
    """Runs compare.py on a small library and the small encoder; returns its exit status."""
    root = tmp_path / "library"
    root.mkdir()
    dataset = docstrings.load(write_library(root))
    monkeypatch.setattr(docstrings, "load", lambda: dataset)
    return lambda out, *options: compare.main([*SMALL, "--model", str(tiny_encoder), "--out", str(out), *options])


def a_trial(name="lora", lr=1e-3, seed=0, losses=(3.0, 2.0), **changes):
    values = {
        "contestant": name,
        "lr": lr,
        "seed": seed,
        "recipe": CONTESTANTS[name].recipe,
        "commit": "abc",
        "trainable": 7,
        "optimizer_state": 14,
        "notes": {},
        "losses": list(losses),
        "validation": [Validation(2, 1.5, 0.25)],
        "test": Scores(1.6, 0.5),
        "diverged": False,
    }
    return Trial(**(values | changes))


# Curves


def test_running_mean_has_full_windows_only():
    assert curves.running_mean([1, 2, 3, 6], 3) == [2, pytest.approx(11 / 3)]
    assert curves.running_mean([1, 3], 20) == [2]
    assert curves.running_mean([], 20) == []


@pytest.mark.parametrize(
    "losses, target, window, steps",
    [
        ([4, 3, 2, 1], 2.5, 2, 3),  # means 3.5, 2.5, 1.5
        ([4, 3, 2, 1], 2.4, 2, 4),
        ([4, 3, 2, 1], 1.4, 2, None),
        ([4, 3, 2, 1], 4, 1, 1),
        ([1, 9, 9, 1], 5, 2, 2),  # the first time, though not the last
        ([4, 2], 3, 20, 2),
        ([4, 2], 2.9, 20, None),
    ],
)
def test_steps_to_counts_the_steps_behind_the_mean(losses, target, window, steps):
    assert curves.steps_to(losses, target, window) == steps


@pytest.mark.parametrize(
    "minimum, tried",
    [
        (2e-3, [1e-3, 2e-3, 5e-3]),
        (2e-2, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]),
        (1e-4, [5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3]),
    ],
)
def test_the_grid_grows_until_the_best_lies_inside(minimum, tried):
    best, scores, inside = curves.best_rate(2e-3, lambda lr: abs(math.log(lr / minimum)))
    assert (best, list(scores), inside) == (minimum, tried, True)


def test_a_rate_that_diverges_is_never_the_best():
    best, scores, inside = curves.best_rate(1e-2, lambda lr: math.nan if lr > 1e-3 else abs(math.log(lr / 5e-4)))
    assert (best, inside) == (5e-4, True)
    assert scores[1e-2] == math.inf


# The file of trials


def test_trials_survive_the_file(tmp_path):
    store = Store(tmp_path / "trials.json", {"steps": 2})
    kept = [
        a_trial(),
        a_trial(lr=2e-3, test=None),
        a_trial("full", diverged=True, validation=[], test=None),
    ]
    for trial in kept:
        store.add(trial)
    again = Store(tmp_path / "trials.json", {"steps": 2})
    assert [again.get(t.contestant, t.lr, t.seed, tested=False) for t in kept] == kept
    assert again.get("lora", 1e-3, 0, tested=True) == kept[0]
    assert again.get("lora", 2e-3, 0, tested=True) is None  # it was not tested
    assert again.get("full", 1e-3, 0, tested=True) == kept[2]  # there is nothing to test
    assert again.get("lora", 1e-3, 1, tested=False) is None


def test_a_contestant_defined_otherwise_since_is_trained_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "trials.json", {})
    store.add(a_trial("lora_ga"))
    monkeypatch.setitem(CONTESTANTS, "lora_ga", replace(CONTESTANTS["lora_ga"], title="another title"))
    assert store.get("lora_ga", 1e-3, 0, tested=False) == a_trial("lora_ga")
    monkeypatch.setitem(CONTESTANTS, "lora_ga", replace(CONTESTANTS["lora_ga"], numbers={"gamma": 99.0}))
    assert store.get("lora_ga", 1e-3, 0, tested=False) is None


def test_trials_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "trials.json"
    Store(path, {"steps": 2, "r": 8}).add(a_trial())
    with pytest.raises(UsageError, match="holds trials made with steps 2, not 3: give those settings, another --out"):
        Store(path, {"steps": 3, "r": 8})


@pytest.mark.parametrize("text", ["", "{}", '{"facts": {}, "format": 2, "trials": [{"lr": 1}]}', "[1]"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "trials.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="not a file of trials"):
        Store(path, {})
    assert path.read_text() == text


def test_several_processes_are_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare.main(["--out", str(tmp_path / "out")]) == 1
    assert "torchrun started 2 processes, want one" in capsys.readouterr().err and not (tmp_path / "out").exists()


# The report


def rates(best=1e-3, inside=True):
    return compare.Rates(best, {best / 2: 2.0, best: 1.0, best * 2: math.inf}, inside)


def test_rows_count_steps_to_the_baselines_loss_with_the_same_seed(monkeypatch):
    monkeypatch.setattr(comparison_report, "WINDOW", 2)
    finals = {
        "lora": [a_trial(losses=[4, 4, 3, 3]), a_trial(seed=1, losses=[4, 4, 2, 2], test=Scores(1.0, 0.7))],
        "lora_ga": [a_trial("lora_ga", losses=[4, 2, 2, 2]), a_trial("lora_ga", seed=1, losses=[4, 4, 3, 2])],
        "full": [
            a_trial("full", diverged=True, validation=[], test=None),
            a_trial("full", seed=1, losses=[1] * 4),
        ],
    }
    rows = {row.contestant: row for row in comparison_report.summarise(finals, ACCURACY)}
    assert rows["lora"].final_loss == (2.5, 2, 3)
    assert rows["lora"].test == pytest.approx((60, 50, 70))
    assert rows["lora"].steps_to_baseline == [4, 4]
    assert rows["lora_ga"].steps_to_baseline == [2, None]
    assert rows["lora_ga"].beside_baseline == pytest.approx((-10, -20, 0))
    assert rows["full"].beside_baseline == pytest.approx((-20, -20, -20))  # its one seed beside the same seed's
    assert (rows["full"].steps_to_baseline, rows["full"].diverged) == ([2], 1)
    lines = comparison_report.table(list(rows.values()), ACCURACY).splitlines()
    assert "2.500 (2.000 to 3.000)" in lines[2]
    assert "60.0 % (50.0 to 70.0)" in lines[2]
    nats = comparison_report.summarise(finals, task_gpt.GptTask.metric)
    assert "1.300 (1.000 to 1.600)" in comparison_report.table(nats, task_gpt.GptTask.metric).splitlines()[2]
    assert "2, not reached" in lines[3]
    assert "-10.0 (-20.0 to +0.0)" in lines[3]
    assert "full fine-tuning (1 diverged)" in lines[4]


def test_the_cost_table_says_what_is_left_at_the_end():
    finals = {"lora": [a_trial()], "dora": [a_trial("dora", notes={"trainable at the end": 5})]}
    costs = {"contestants": {name: {"step_seconds": 0.25, "peak_bytes": 3 * 2**20} for name in finals}}
    lines = comparison_report.cost_table(comparison_report.summarise(finals, ACCURACY), costs).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [["LoRA", "7", "14", "4.0", "3.0 MiB"], ["DoRA", "7 to 5", "14", "4.0", "3.0 MiB"]]


# The command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--contestants", "lora", "qlora"], "argument --contestants: invalid choice: 'qlora'"),
        (["--seeds", "0"], "--seeds: want a positive integer, got 0"),
        (["--search-seeds", "none"], "--search-seeds: want a positive integer, got 'none'"),
        (["--steps", "0"], "--steps: want a positive integer, got 0"),
        (["--dropout", "1"], "--dropout: want a number from 0 up to, not including, 1, got 1"),
        (["--lr", "0"], "--lr: want a positive number, got 0"),
        (["--task", "mnist"], "argument --task: invalid choice: 'mnist'"),
        (["--task", "gpt", "--max-length", "9"], "--max-length: the task gpt has no such setting"),
        (["--task", "digits", "--head-lr", "1"], "--head-lr: the task digits has no such setting"),
        (
            ["--optimizer", "sgd", "--contestants", "lora", "lora_plus"],
            "--contestants lora_plus: not with --optimizer sgd: its ratio of rates",
        ),
    ],
)
def test_a_wrong_argument_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        parse_comparison(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults_are_the_tasks_own():
    docs, digits = parse_comparison([]), parse_comparison(["--task", "digits", "--optimizer", "sgd", "--out", "here"])
    assert (docs.task, docs.steps, docs.max_length) == ("docstrings", 150, 32)
    assert docs.lr == COMPARISON["docstrings"]["lr"]["adamw"]
    assert (digits.steps, digits.max_length, digits.lr) == (100, None, COMPARISON["digits"]["lr"]["sgd"])
    assert (str(digits.folder), str(digits.pretrained_models)) == ("here/digits-sgd", "here/pretrained")
    assert str(docs.folder) == "runs/compare/docstrings"
    assert docs.contestants == tuple(CONTESTANTS)
    assert "lora_plus" not in digits.contestants
    given = parse_comparison(["--task", "gpt", "--quick", "--steps", "9"])
    assert (given.steps, given.seeds, str(given.folder)) == (9, QUICK["seeds"], "runs/compare/quick/gpt")


@pytest.fixture
def small_gpt(monkeypatch):
    monkeypatch.setattr(task_gpt, "Shape", lambda: Shape(width=64, layers=1, heads=2, context=16))
    monkeypatch.setattr(topics, "sources", lambda: b"def f(x):\n    return x\n" * 50)


@pytest.mark.parametrize("task", ["docstrings", "gpt", "digits", pytest.param("language", marks=pytest.mark.slow)])
def test_every_contestant_gets_through_the_quick_run(run, small_gpt, tmp_path, monkeypatch, task):
    options = ["--task", task, "--quick", "--device", "cpu", "--out", str(tmp_path / "out"), "--batch-size", "16"]
    if task == "language":
        pairs = functions.load(write_functions(tmp_path / "functions"))
        monkeypatch.setattr(functions, "load", lambda: pairs)
        options += ["--model", str(save_tiny_language_model(tmp_path / "model")), "--r", "4"]
    assert (run(tmp_path / "out", "--quick") if task == "docstrings" else compare.main(options)) == 0
    folder = tmp_path / "out" / "quick" / task
    results = json.loads((folder / "results.json").read_text())
    assert [row["contestant"] for row in results["one rate"]] == list(CONTESTANTS)
    for name, runs in results["trials"].items():
        assert [trial["seed"] for trial in runs] == [0, 1]
        assert all(len(trial["losses"]) == QUICK["steps"] for trial in runs)
        assert [trial["losses"][0] for trial in runs] == pytest.approx(
            [trial["losses"][0] for trial in results["trials"]["full"]], rel=1e-4
        ), f"{name} starts elsewhere"
    assert len({tuple(runs[0]["losses"]) for runs in results["trials"].values()}) == len(CONTESTANTS)
    assert set(results["costs"]["contestants"]) == set(CONTESTANTS)
    assert (folder / "loss.png").stat().st_size > 10_000
    text = (folder / "results.md").read_text()
    assert all(text.count(f"| {entry.title} ") >= 2 for entry in CONTESTANTS.values())  # at one rate, and what it costs
    assert "LoRA-GA of sign(G)" in text


def test_an_interrupted_comparison_goes_on_to_the_same_result(run, tmp_path, monkeypatch, capsys):
    options = ["--contestants", "lora", "lora_ga", "--seeds", "2", "--eval-every", "2", "--no-plot"]
    monkeypatch.setattr(curves, "MOST_RATES", 3)
    assert run(tmp_path / "whole", *options) == 0
    real, made = trials.run_trial, []

    def run_trial(task, name, lr, seed, **rest):
        made.append((name, lr, seed))
        if len(made) == 5:
            raise KeyboardInterrupt
        return real(task, name, lr, seed, **rest)

    monkeypatch.setattr(trials, "run_trial", run_trial)
    assert run(tmp_path / "parts", *options) == INTERRUPTED
    folder = tmp_path / "parts" / "docstrings"
    assert f"what was finished is kept in {tmp_path / 'parts'}" in capsys.readouterr().err
    assert not (folder / "results.json").exists()
    assert run(tmp_path / "parts", *options) == 0
    assert made.count(made[4]) == 2  # the one under way
    whole, parts = (json.loads((tmp_path / o / "docstrings" / "results.json").read_text()) for o in ("whole", "parts"))
    best = {row["contestant"]: row["lr"] for row in whole["best rates"]}
    one_rate = COMPARISON["docstrings"]["lr"]["adamw"]
    expected = sum(3 + 2 + (2 if lr != one_rate else 0) for lr in best.values())
    assert len(made) == expected + 1  # and no other
    assert whole["trials"] == parts["trials"]
    assert whole["search"] == parts["search"]
    assert whole["alignment"] == parts["alignment"]
    # The rate comes from one seed's validation loss, the results from others'.
    for name, lr in best.items():
        search = {float(tried): loss for tried, loss in whole["search"][name].items()}
        assert lr == min(search, key=search.__getitem__)
    assert {row["lr"] for row in whole["one rate"]} == {one_rate}
    kept = json.loads((tmp_path / "whole" / "docstrings" / "trials.json").read_text())["trials"]
    assert {trial["seed"] for trial in kept if trial["test"] is None} == {compare.SEARCH_SEED}
    assert {trial["seed"] for trial in kept if trial["test"] is not None} == {0, 1}
    assert [found["step"] for found in whole["trials"]["lora"][0]["validation"]] == [2, 4]


@pytest.mark.parametrize(
    "writes", ["pathlib.Path.write_text", "study.data.pretraining.save_file", "matplotlib.figure.Figure.savefig"]
)
def test_a_full_disk_is_an_error_in_a_line_and_leaves_no_piece(tmp_path, monkeypatch, capsys, writes):
    error = SafetensorError("full") if writes.endswith("save_file") else OSError(28, "No space left on device")
    options = ["--task", "digits", "--quick", "--device", "cpu", "--contestants", "lora", "--out", str(tmp_path)]
    monkeypatch.setattr(writes, lambda *_, **__: (_ for _ in ()).throw(error))
    assert compare.main(options) == 1
    assert re.search(r"compare.py: error: .*(full|No space left)", capsys.readouterr().err)
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    monkeypatch.undo()
    assert compare.main(options) == 0
