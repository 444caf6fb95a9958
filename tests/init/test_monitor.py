"""AlignmentMonitor against explicit gradients and projectors; what it leaves of the training run and of the model."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from largest import Largest
from mixtures import experts_in, mixture, peft_mixture, randomise, tokens
from model_state import ModelState
from plain_models import LINEARS, Net
from started_nets import R, patched
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import fastlora
from fastlora import AlignmentMonitor
from fastlora.adapters import first_forward
from fastlora.init.monitor import measure, space_of
from fastlora.introspect.targets import called, lora_layers


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3 + i, 4, 6, generator=generator) for i in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def with_peft(**options: Any) -> Any:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=R, target_modules=["up", "down", "head"], init_lora_weights=False, **options)
    layers = {"up": nn.Linear(6, 10), "act": nn.Tanh(), "down": nn.Linear(10, 8), "head": nn.Linear(8, 7)}
    return peft.get_peft_model(nn.Sequential(OrderedDict(layers)), config)  # type: ignore[arg-type]


def with_fused_peft() -> Any:
    model = with_peft()
    fastlora.patch(model)
    return model


def monitored(model: nn.Module, micro_batches: list[Tensor], **options: Any) -> fastlora.init.AlignmentRecord:
    with AlignmentMonitor(model, **options) as monitor:
        for x in micro_batches:
            loss_of(model, x).backward()
        record = monitor.step()
    assert record is not None
    return record


def exact_gradients(model: nn.Module, names: list[str], micro_batches: list[Tensor]) -> dict[str, Tensor]:
    """(out, in), summed over the micro-batches, in float64."""
    model = copy.deepcopy(model).double()
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    weights = {name: getattr(layer, "base_layer", layer).weight.requires_grad_(True) for name, layer in layers.items()}
    for weight in weights.values():
        weight.grad = None
    sum(loss_of(model, x.double()) for x in micro_batches).backward()  # type: ignore[union-attr]
    return {
        name: weight.grad.t() if getattr(layers[name], "fan_in_fan_out", False) else weight.grad
        for name, weight in weights.items()
    }


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return tuple(getattr(part, "weight", part).detach().double() for part in (a, b))  # type: ignore[return-value]


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


def expected(g: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    """The alignment and the step's cosine, by their definitions."""
    p_b, p_a = projector(b), projector(a.t())
    reached = p_b @ g + g @ p_a - p_b @ g @ p_a
    step = b @ b.t() @ g + g @ a.t() @ a
    return (reached.norm() / g.norm()).item(), ((step * g).sum() / (step.norm() * g.norm())).item()


@pytest.mark.parametrize("make", [patched, with_peft, with_fused_peft])
def test_against_explicit_gradients(make: Callable[[], Any]):
    model = make()
    micro_batches = batches()
    record = monitored(model, micro_batches, norm="exact")
    gradients = exact_gradients(model, list(record.layers), micro_batches)
    assert len(gradients) == (7 if make is patched else 3)
    for name, line in record.layers.items():
        alignment, cosine = expected(gradients[name], *factors(model.get_submodule(name)))
        assert line.alignment == pytest.approx(alignment, rel=1e-4)
        assert line.cosine == pytest.approx(cosine, rel=1e-4, abs=1e-5)
        assert line.norm == pytest.approx(gradients[name].norm().item(), rel=1e-4)
        assert line.tokens == sum(x.shape[0] * x.shape[1] for x in micro_batches)
    squares = {name: g.square().sum().item() for name, g in gradients.items()}
    reached = sum(record.layers[name].alignment ** 2 * square for name, square in squares.items())
    assert record.overall == pytest.approx(math.sqrt(reached / sum(squares.values())), rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "peft", "fused peft", "started peft"])
def test_experts_against_explicit_gradients(kind: str):
    """Each from its own tokens, next to a linear layer, and with a sketch that looks at the same time."""
    base, x = mixture("gpt_oss"), tokens(4, 20)
    chosen: Any = {"target_modules": ["o_proj"], "target_parameters": experts_in(base)}
    if kind == "plain":
        model = copy.deepcopy(base)
        fastlora.patch(model, r=3, **chosen)
        randomise(model)
    else:
        model = peft_mixture(base, **chosen)
        if kind != "peft":
            fastlora.patch(model)
        if kind == "started peft":
            with fastlora.GradientSketch(model, r=3, **chosen) as sketch:
                model(input_ids=x, labels=x).loss.backward()
            fastlora.init_lora_ga(model, sketch, missing="kaiming")
            randomise(model)
    kinds = [type(module) for module in model.modules()]
    with AlignmentMonitor(model, norm="exact", **chosen) as monitor:
        with fastlora.GradientSketch(model, r=3, freeze=False, **chosen) as sketch:
            model(input_ids=x, labels=x).loss.backward()
        record = monitor.step()
    assert record is not None and [type(module) for module in model.modules()] == kinds
    merged = copy.deepcopy(model)  # the gradient of W0 at W0 + s·B A
    fastlora.merge(merged)
    for module in merged.modules():
        if hasattr(module, "is_transposed"):
            module.config._experts_implementation = "eager"  # transformers' others have no float64
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.dim() == 3)
    merged.double()(input_ids=x, labels=x).loss.backward()
    whole = {name.replace(".base_layer", ""): p.grad for name, p in merged.named_parameters() if p.grad is not None}
    seen = 0
    for name, layer in lora_layers(model):
        if (weight := called(name, layer)) not in whole:
            continue
        a, b = (
            getattr(f["default"], "trained", getattr(f["default"], "weight", f["default"]))
            for f in (layer.lora_A, layer.lora_B)
        )
        for e, gradient in enumerate(whole[weight].mT):
            line = record.layers.get(f"{weight}[{e}]")
            assert (line is None) == (not gradient.any())
            if line is not None:
                seen += 1
                own = a.detach().double().view(4, -1, a.shape[1])[e], b.detach().double().view(len(b), -1, 4)[:, :, e]
                alignment, cosine = expected(gradient, *own)
                assert line.alignment == pytest.approx(alignment, rel=1e-4)
                assert line.cosine == pytest.approx(cosine, rel=1e-3, abs=1e-5)
                assert line.norm == pytest.approx(gradient.norm().item(), rel=1e-4)
                assert line.tokens == sketch.layers[f"{weight}[{e}]"].tokens
    assert seen >= 8 and any(name.endswith("o_proj") for name in record.layers)


def test_probes_estimate_the_norm():
    """With many probes they come as near as 1/√probes; the captured part is exact either way."""
    model, micro_batches = patched(), batches()
    exact = monitored(model, micro_batches, norm="exact")
    estimated = monitored(model, micro_batches, probes=4000)
    for name, line in estimated.layers.items():
        assert line.alignment == pytest.approx(exact.layers[name].alignment, rel=0.1)
        captured = line.alignment * line.norm
        assert captured == pytest.approx(exact.layers[name].alignment * exact.layers[name].norm, rel=1e-4)
    few = [monitored(model, micro_batches, probes=4, seed=seed).layers["blocks.0.up"].norm ** 2 for seed in range(100)]
    assert sum(few) / 100 == pytest.approx(exact.layers["blocks.0.up"].norm ** 2, rel=0.1)  # unbiased


def test_what_the_adapter_cannot_reach_does_not_count():
    model = patched(init_lora_weights=True)  # B = 0: only G Aᵀ A, in A's rows
    record = monitored(model, batches(), norm="exact")
    gradients = exact_gradients(model, list(record.layers), batches())
    for name, line in record.layers.items():
        a, _ = factors(model.get_submodule(name))
        g = gradients[name]
        assert line.alignment == pytest.approx(((g @ projector(a.t())).norm() / g.norm()).item(), rel=1e-4)
    frozen_a = patched()
    for layer in frozen_a.modules():
        if isinstance(layer, fastlora.FusedLoraLinear):
            layer.lora_A["default"].requires_grad_(False)  # so that B's columns cannot be carried anywhere
    for name, line in monitored(frozen_a, batches(), norm="exact").layers.items():
        a, _ = factors(frozen_a.get_submodule(name))
        g = exact_gradients(frozen_a, [name], batches())[name]
        assert line.alignment == pytest.approx(((g @ projector(a.t())).norm() / g.norm()).item(), rel=1e-4)


def test_lora_ga_attains_the_optimum():
    """Of rank 2r, of the gradient that it was sketched from; ordinary LoRA does not."""
    model = Net()
    with fastlora.GradientSketch(model, r=R, exclude_modules=["head"], weighting="equal") as sketch:
        for x in batches():
            loss_of(model, x).backward()
    ordinary = copy.deepcopy(model)
    fastlora.init_lora_ga(model, sketch)
    fastlora.patch(ordinary, r=R, target_modules=sketch.names)
    record = monitored(model, batches(), norm="exact")
    gradients = exact_gradients(Net(), sketch.names, batches())
    for name, g in gradients.items():
        g = g if g.shape == (model.get_submodule(name).out_features, model.get_submodule(name).in_features) else g.t()
        sigma = torch.linalg.svdvals(g)
        best = (sigma[: 2 * R].norm() / sigma.norm()).item()
        assert record.layers[name].alignment == pytest.approx(best, rel=1e-3)
        assert record.layers[name].cosine == pytest.approx(best, rel=1e-3)  # equal scales: the step itself is it
    assert monitored(ordinary, batches(), norm="exact").overall < record.overall


def test_several_adapters_count_together():
    model = patched()
    fastlora.patch(model, r=3, adapter_name="second", target_modules=LINEARS, init_lora_weights=False)
    fastlora.set_adapter(model, ["default", "second"])
    layer: Any = model.get_submodule("blocks.0.up")
    record = monitored(model, batches(), norm="exact", target_modules=["blocks.0.up"])
    g = exact_gradients(model, ["blocks.0.up"], batches())["blocks.0.up"]
    a = torch.cat([layer.lora_A[name].detach().double() for name in ("default", "second")])
    b = torch.cat([layer.lora_B[name].detach().double() for name in ("default", "second")], dim=1)
    assert list(record.layers) == ["blocks.0.up"]
    assert record.layers["blocks.0.up"].alignment == pytest.approx(expected(g, a, b)[0], rel=1e-4)
    fastlora.set_adapter(model, "default")
    alone = monitored(model, batches(), norm="exact").layers["blocks.0.up"].alignment
    g = exact_gradients(model, ["blocks.0.up"], batches())["blocks.0.up"]
    assert alone == pytest.approx(expected(g, *factors(layer))[0], rel=1e-4)


def test_the_start_of_a_peft_adapter_does_not_count():
    """LoRA-GA's frozen half in PEFT's layers is none of the tangent space."""
    model = with_peft()
    with fastlora.GradientSketch(model, r=R) as sketch:
        loss_of(model, batches()[0]).backward()
    fastlora.init_lora_ga(model, sketch)
    record = monitored(model, batches()[:1], norm="exact")
    for name in sketch.names:
        layer = model.get_submodule(name)
        a, b = (layer.lora_A["default"].trained, layer.lora_B["default"].trained)
        g = exact_gradients(model, [name], batches()[:1])[name]
        alignment, _ = expected(g, a.detach().double(), b.detach().double())
        assert record.layers[name].alignment == pytest.approx(alignment, rel=1e-3)


# Training goes on as if nothing were there.
def trained(model: Any, batch: dict[str, Tensor], monitor: AlignmentMonitor | None, **options: Any) -> list[Tensor]:
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        for _ in range(2):  # micro-batches
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step()
    return losses


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", ["patched", "peft"])
def test_the_losses_are_the_same_bits(kind, checkpointing):
    runs = []
    for watch in (False, True):
        model: Any = tiny_model("llama", hidden_dropout=0.1)
        torch.manual_seed(0)
        if kind == "patched":
            fastlora.patch(model, r=R, lora_dropout=0.1)
            first_forward.forget(model)
        else:
            model = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_dropout=0.1, target_modules="all-linear"))
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        if watch:
            hooks = [len(module._forward_hooks) for module in model.modules()]
            with AlignmentMonitor(model, every=2) as monitor:
                losses = trained(model, tiny_batch("llama"), monitor)
            assert [record.step for record in monitor.history] == [0, 2]
            tokens = tiny_batch("llama")["input_ids"].numel()
            for line in monitor.history[0].layers.values():  # each once, also where it is computed again
                assert line.tokens == 2 * tokens and 0 <= line.alignment <= 1
            assert len(monitor.history[0].layers) == 14
            assert [len(module._forward_hooks) for module in model.modules()] == hooks
        else:
            losses = trained(model, tiny_batch("llama"), None)
        runs.append((losses, [p.detach().clone() for p in model.parameters()]))
    for before, after in zip(*runs):
        assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_model_is_left_as_it_was_also_after_an_exception():
    model = patched()
    state = ModelState(model)
    monitor = AlignmentMonitor(model)
    with pytest.raises(ValueError, match="shape"), monitor:
        loss_of(model, torch.randn(2, 5))
    state.assert_unchanged()
    assert not monitor.active and monitor.history == []
    with monitor:  # and again
        loss_of(model, batches()[0]).backward()
        assert monitor.step() is not None
    monitor.close()
    state.assert_unchanged()


def test_at_steps_that_are_not_measured_there_are_no_hooks():
    model = patched()
    layer = model.get_submodule("head")
    with AlignmentMonitor(model, every=3) as monitor:
        assert len(layer._forward_hooks) == 1
        monitor.step()
        assert len(layer._forward_hooks) == 0
        monitor.step()
        monitor.step()
        assert len(layer._forward_hooks) == 1
    with pytest.raises(RuntimeError, match="not active"):
        monitor.step()


def test_nothing_of_the_size_of_a_gradient_is_made():
    model = nn.Sequential(nn.Linear(300, 400, bias=False))
    fastlora.patch(model, r=R, init_lora_weights=False)
    x = torch.randn(20, 300, requires_grad=True)
    with AlignmentMonitor(model, probes=8) as monitor:
        loss = model(x).square().mean()
        with Largest() as largest:
            loss.backward()
            monitor.step()
    assert 0 < largest.elements < 300 * 400 / 8


def test_evaluation_in_between_is_not_seen():
    model = patched()
    with AlignmentMonitor(model) as monitor:
        with torch.no_grad():
            model(batches()[0])
        loss_of(model, batches()[1]).backward()
        record = monitor.step()
    assert record is not None and record.layers["head"].tokens == batches()[1].shape[0] * 4


def test_a_compiled_model():
    """Compiled again where the hooks come and go; the same losses, and the layers are seen."""
    model = patched(target_modules=["blocks.0.up", "head"])
    eager = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    with AlignmentMonitor(model, every=2) as monitor:
        for step in range(3):
            loss, expected = loss_of(compiled, batches()[0]), loss_of(eager, batches()[0])
            loss.backward()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
            record = monitor.step()
            assert (record is None) == (step == 1) and (record is None or len(record.layers) == 2)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    """Against G from the very X and dY that the layer had in bfloat16."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 11))
    x = torch.randn(20, 12)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    fastlora.patch(model, r=R, init_lora_weights=False)
    seen: dict[str, Tensor] = {}
    with AlignmentMonitor(model, norm="exact") as monitor:
        model[2].register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
        model[2].register_forward_hook(lambda module, args, y: y.register_hook(lambda dy: seen.update(dy=dy)) and None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(x).square().mean()
        loss.backward()
        record = monitor.step()
    assert record is not None and seen["dy"].dtype == torch.bfloat16
    alignment, cosine = expected(seen["dy"].double().t() @ seen["x"].double(), *factors(model[2]))
    assert record.layers["2"].alignment == pytest.approx(alignment, rel=1e-4)
    assert record.layers["2"].cosine == pytest.approx(cosine, rel=1e-4)


def test_gradients_that_are_not_finite_or_zero():
    model = patched()
    with AlignmentMonitor(model) as monitor:
        (loss_of(model, batches()[0]) * math.inf).backward()
        record = monitor.step()
    assert record is not None and math.isnan(record.overall)
    assert all(math.isnan(line.alignment) for line in record.layers.values())
    record = None
    with AlignmentMonitor(model) as monitor:
        (loss_of(model, batches()[0]) * 0).backward()
        record = monitor.step()
    assert record is not None and math.isnan(record.overall)
    with AlignmentMonitor(model) as monitor:
        assert monitor.step().layers == {}  # type: ignore[union-attr]  # no backward pass at all
    assert "alignment nan" in str(monitor)


def test_history_tables_and_callbacks():
    seen: list[Any] = []
    model = patched()
    monitor = AlignmentMonitor(model, every=2, on_record=seen.append)
    assert "0 records" in repr(monitor) == str(monitor)
    with monitor:
        for _ in range(5):
            loss_of(model, batches()[0]).backward()
            monitor.step()
    assert seen == monitor.history and [record.step for record in seen] == [0, 2, 4]
    assert "alignment 0." in repr(monitor) and "at step 4" in repr(monitor)
    assert str(monitor).splitlines()[0].startswith("step 4: alignment 0.") and "blocks.1.down" in str(monitor)
    assert [line.split()[0] for line in monitor.as_table().splitlines()] == ["step", "0", "2", "4"]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no LoRA layers"):
        AlignmentMonitor(Net())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"every": 0}, "every: got 0, want an integer of at least 1"),
        ({"probes": 1.5}, "probes: got 1.5"),
        ({"norm": "sum"}, "norm: got 'sum', want one of probes, exact"),
        ({"target_modules": ["nothing"]}, "selects none of this Net's LoRA layers"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            AlignmentMonitor(patched(), **options)
    monitor = AlignmentMonitor(patched()).start()
    with pytest.raises(RuntimeError, match="active already"):
        monitor.start()


def test_measure_on_factors_that_depend_on_each_other():
    """Columns that are multiples of others span no more than these."""
    torch.manual_seed(0)
    g, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((9, 7), (3, 7), (9, 3)))
    a[2], b[:, 1] = a[0] + a[1], 0
    space = space_of(a, b)
    line = measure(space, g @ space.right.double(), g.t() @ space.left.double(), 1, squared_norm=g.square().sum())
    assert line.alignment == pytest.approx(expected(g, a, b)[0], rel=1e-5)
    assert line.cosine == pytest.approx(expected(g, a, b)[1], rel=1e-5)
