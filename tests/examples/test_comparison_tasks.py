"""The comparison's tasks: data that no part shares, the small models, and their pretraining, kept in a file."""

import math

import pytest
import torch

pytest.importorskip("sklearn")

from study.data import byte_gpt, topics
from study.data.byte_gpt import ByteGPT, Shape
from study.data.pretraining import pretrained, weights_hash
from study.settings import parse_comparison
from study.tasks import digits as task_digits
from study.tasks import gpt as task_gpt
from study.tasks import task as tasks
from study.tasks.task import load_task, shuffled_epochs
from tiny_examples import digits_task
from torch import nn

CPU = torch.device("cpu")


# The topics


def test_no_paragraph_is_in_two_topics_or_two_parts():
    shared = "A paragraph that a chapter and one of its sections share."
    found = {f"topic {i}": f"Only in {i}.\n\n{shared}\n\n" for i in range(40)} | {"again": shared.upper() + "\n"}
    parts = topics.load(found)
    texts = b"\n".join(parts.values()).decode()
    assert texts.casefold().count(shared.casefold()) == 1
    assert all(texts.count(f"Only in {i}.") == 1 for i in range(40))
    assert all(parts[part] for part in tasks.PARTS)


def test_the_sources_are_the_librarys_without_topics_and_tests(tmp_path):
    for name in ("kept.py", "pydoc_data/topics.py", "test/test_kept.py", "pkg/site-packages/other.py", "pkg/kept.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"'{name}'\n")
    assert topics.sources(tmp_path) == b"'kept.py'\n\n'pkg/kept.py'\n"


# The byte-level GPT


def test_a_byte_is_predicted_from_those_before_it():
    torch.manual_seed(0)
    model = ByteGPT(Shape(width=32, layers=2, heads=2, context=16)).eval()
    windows = torch.randint(0, 256, (2, 17))
    changed = windows.clone()
    changed[:, 9] += 1
    changed %= 256
    before, after = (byte_gpt.next_byte(model, w)[0].unflatten(0, (2, 16)) for w in (windows, changed))
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert all((before[:, t] - after[:, t]).abs().max() > 1e-4 for t in range(9, 16))
    assert torch.equal(byte_gpt.next_byte(model, windows)[1], windows[:, 1:].flatten())


@pytest.fixture
def small_gpt(tmp_path, monkeypatch):
    """The task with a small model, on little text."""
    monkeypatch.setattr(task_gpt, "Shape", lambda: Shape(width=32, layers=1, heads=2, context=16))
    monkeypatch.setattr(task_gpt, "PRETRAINING", {"steps": 120, "batch_size": 8, "lr": 1e-2, "seed": 0})
    monkeypatch.setattr(topics, "sources", lambda: b"def f(x):\n    return x\n" * 50)
    return lambda: load_task(parse_comparison(["--task", "gpt", "--device", "cpu", "--out", str(tmp_path)]), CPU)


def test_the_gpt_is_pretrained_once_and_adapted_below_its_head(small_gpt, monkeypatch, capsys):
    task = small_gpt()
    assert "pretraining the byte-level GPT: 120/120" in capsys.readouterr().err
    model = task.fresh_model(0)
    seen = task_gpt.windows(b"def f(x):\n    return x\n" * 4, 17)
    assert nn.functional.cross_entropy(*byte_gpt.next_byte(model, seen)) < 1 < math.log(256) / 2
    monkeypatch.setattr(task_gpt, "fit", None)  # a second time nothing is trained
    again = small_gpt()
    assert again.facts == task.facts
    assert task.facts["weights"] == weights_hash(model.state_dict())
    from study import learner as learners
    from study.contestants import CONTESTANTS

    adapted = learners.lora_layers(learners.prepared_model(task, CONTESTANTS["lora"], 0))
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert set(adapted) == {f"blocks.0.attention.{name}" for name in names} | {"blocks.0.up_proj", "blocks.0.down_proj"}


# The file of a pretrained model


def a_model(value=1.0):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    return model


def test_weights_are_kept_for_the_same_facts_only(tmp_path):
    made = []

    def train():
        made.append(1)
        return a_model(len(made))

    path = tmp_path / "deep" / "model.safetensors"
    first = pretrained(path, {"steps": 1}, train)
    assert torch.equal(pretrained(path, {"steps": 1}, train)["weight"], first["weight"])
    assert len(made) == 1
    assert torch.equal(pretrained(path, {"steps": 2}, train)["weight"], torch.full((1, 2), 2.0))
    assert len(made) == 2
    path.write_bytes(path.read_bytes()[:-3])  # cut short
    pretrained(path, {"steps": 2}, train)
    assert len(made) == 3
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


# The digits


def test_digits_are_turned_by_a_quarter_and_inverted():
    x = torch.zeros(1, 64)
    x[0, 7] = 1  # top right
    shifted = task_digits.rotated_and_inverted(x)
    assert (shifted[0, 0], shifted.sum()) == (0, 63)  # is top left after a turn to the left; paper is ink now


def test_no_image_is_in_two_parts():
    parts = task_digits.digits()
    rows = [tuple(image.tolist()) for x, _ in parts.values() for image in x]
    assert len(rows) == len(set(rows)) > 1790
    assert {part: len(x) for part, (x, _) in parts.items()} == {"train": 1262, "validation": 170, "test": 365}
    assert all(x.min() == 0 and x.max() == 1 for x, _ in parts.values())


def test_the_shift_is_one(tmp_path):
    task = digits_task(tmp_path)
    known, before = (task.accuracy(images["test"]) for images in (task.original, task.shifted))
    assert known > 0.95
    assert before < 0.3
    assert f"test accuracy {100 * known:.1f} %" in task.description
    assert task.scores(task.fresh_model(0), "test").accuracy == pytest.approx(before)


def test_epochs_have_every_example_once():
    order = shuffled_epochs(10, 3, 7, seed=1)
    assert order == shuffled_epochs(10, 3, 7, seed=1) != shuffled_epochs(10, 3, 7, seed=2)
    for epoch in (order[:3], order[3:6]):
        assert len({i for batch in epoch for i in batch}) == 9
    with pytest.raises(ValueError, match="--batch-size 11: the training set has only 10 examples"):
        shuffled_epochs(10, 11, 1, seed=0)
