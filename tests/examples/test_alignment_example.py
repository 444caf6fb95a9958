"""The first step beside full fine-tuning's: against real steps, and in the order that theory gives."""

import statistics

import pytest
import torch

pytest.importorskip("sklearn")

from study import alignment
from study import learner as learners
from study.alignment import BOUND, STARTS
from tiny_examples import digits_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return digits_task(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def found(task):
    return alignment.measure(task)


def median(found, step, start):
    return statistics.median(residual for residual, _ in found[step][start].values())


def test_no_start_beats_the_best_change_of_its_rank(found):
    for starts in found.values():
        for layers in starts.values():
            for name, (residual, _) in layers.items():
                assert residual >= starts[BOUND][name][0] - 1e-6


def test_with_sgd_lora_ga_takes_nearly_the_best_step_of_its_rank(found):
    bound, lora_ga, pissa, lora = (median(found, "sgd", start) for start in (BOUND, "lora_ga", "pissa", "lora"))
    assert lora_ga < bound + 0.02
    assert lora_ga < pissa < lora
    assert lora > 0.9
    assert 0.1 < pissa < 0.6
    assert lora_ga < min(median(found, "sgd", "sign"), median(found, "sgd", "sign_svd"))


def test_with_adam_the_factors_found_for_it_are_nearest(found):
    direct, svd, lora_ga, lora = (median(found, "adam", start) for start in ("sign", "sign_svd", "lora_ga", "lora"))
    assert direct < 0.5 * svd
    assert svd < lora_ga + 0.02
    assert lora_ga < lora
    assert lora > 0.9
    assert direct < 0.35


@pytest.mark.parametrize("start", ["lora", "pissa", "lora_ga", "sign"])
@pytest.mark.parametrize("step", ["sgd", "adam"])
def test_it_is_what_a_step_of_the_optimiser_does(task, start, step):
    """The effective weight after one real step, with a small rate."""
    model = learners.prepared_model(task, STARTS[start], alignment.SEED)
    layers = learners.lora_layers(model)
    for parameter in model.parameters():  # in double precision a small step is seen
        parameter.data = parameter.data.double()
    for buffer in (b for m in model.modules() for b in m._buffers.values() if b is not None):
        buffer.data = buffer.data.double()
    kind = torch.optim.SGD if step == "sgd" else torch.optim.Adam
    lr = 1e-6
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=lr)
    before = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    task.backward_passes(
        model,
        [[(share, (x.double(), y)) for share, (x, y) in shares] for shares in task.gradient_batches(alignment.SEED)],
    )
    optimizer.step()
    expected = alignment.first_changes(task, STARTS[start])[step]
    for name, layer in layers.items():
        change = (layer.get_delta_weight("default") - before[name]) / -lr
        _, cosine = alignment.beside(change, expected[name])
        assert cosine > 0.999, (name, cosine)
        assert change.norm() == pytest.approx(float(expected[name].norm()), rel=0.02)


def test_an_uphill_step_counts_as_none():
    wanted = torch.tensor([[1.0, 2.0]])
    assert alignment.beside(-wanted, wanted) == [1.0, -1.0]
    assert alignment.beside(3 * wanted, wanted) == [0.0, 1.0]
    assert alignment.beside(0 * wanted, wanted) == [1.0, 0.0]
