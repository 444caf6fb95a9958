"""GradientSketch against the exact gradients of the unfrozen model, and what it leaves of the model.

Where a sketch is as wide as a layer, Q Zᵀ is the gradient itself, and any token that is missed or counted twice shows.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from largest import Largest
from model_state import ModelState
from plain_models import Net, submodule
from tiny_models import ARCHITECTURES, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import GradientSketch
from fastlora.introspect import taps

Loss = Callable[[nn.Module], Tensor]


def base_weight(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer).weight


def exact_gradients(model: nn.Module, names: list[str], losses: list[Loss], weights: list[float]) -> dict[str, Tensor]:
    """Σ weight·dloss/dW per layer as (out, in), by autograd, on a copy without dropout."""
    model = copy.deepcopy(model)
    taps.turn_dropout_off(model)()  # what it undoes, and then for good:
    for module in model.modules():
        module.training = False
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for layer in layers.values():
        base_weight(layer).requires_grad_(True)
    sums = {name: torch.zeros_like(base_weight(layer), dtype=torch.float64) for name, layer in layers.items()}
    for loss, weight in zip(losses, weights):
        grads = torch.autograd.grad(loss(model), [base_weight(layer) for layer in layers.values()], allow_unused=True)
        for name, grad in zip(layers, grads):
            sums[name] += weight * (0 if grad is None else grad.double())
    transposed = {name for name, layer in layers.items() if getattr(layer, "fan_in_fan_out", type(layer) is Conv1D)}
    return {name: g.t() if name in transposed else g for name, g in sums.items()}


def sketched(model: nn.Module, losses: list[Loss], **options: Any) -> GradientSketch:
    with GradientSketch(model, **{"r": 2, "width": 64, **options}) as sketch:
        for loss in losses:
            loss(model).backward()
    return sketch


def assert_is(sketch: GradientSketch, expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert sketch.names == list(expected)
    for name, g in expected.items():
        assert sketch.layers[name].width == min(g.shape), "want a sketch that holds all"
        q, z = sketch.layers[name].factors()
        error = ((q @ z.t()).double() - g).norm() / g.norm()
        assert error < tolerance, f"{name}: {error}"


def batches_of(architecture: str) -> list[dict[str, Tensor]]:
    """Three micro-batches of different numbers of tokens."""
    batch = tiny_batch(architecture)
    if architecture in ("vit", "bert-classifier"):
        return [{key: value[:n] for key, value in batch.items()} for n in (2, 1)]
    first = {key: value[:, :7].contiguous() for key, value in batch.items()}
    masked = {key: value.clone() for key, value in batch.items()}
    masked["labels"][:, 4:] = -100
    return [batch, first, masked]


def losses_of(architecture: str, dtype: torch.dtype = torch.float32) -> tuple[list[Loss], list[float]]:
    batches = [
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        for batch in batches_of(architecture)
    ]
    losses: list[Loss] = [lambda model, batch=batch: model(**batch).loss for batch in batches]
    return losses, [float((batch["labels"] != -100).sum()) for batch in batches]


@pytest.mark.parametrize("kind", ["plain", "patched", "peft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_models(architecture, kind):
    model: Any = tiny_model(architecture).double()
    torch.manual_seed(0)
    if kind == "patched":
        fastlora.patch(model, r=2, init_lora_weights=False)
    elif kind == "peft":
        targets = ["c_attn", "c_proj", "c_fc"] if architecture == "gpt2" else "all-linear"
        config = peft.LoraConfig(
            r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=architecture == "gpt2"
        )
        model = peft.get_peft_model(model, config).eval()
    losses, weights = losses_of(architecture, torch.float64)
    sketch = sketched(model, losses, weighting="tokens")
    assert_is(sketch, exact_gradients(model, sketch.names, losses, weights), tolerance=1e-5)


@pytest.mark.parametrize("wrapper", ["fastlora", "autocast"])
def test_half_precision(wrapper):
    model = tiny_model("llama")
    losses, _ = losses_of("llama")
    if wrapper == "autocast":
        plain = losses

        def under_autocast(loss: Loss) -> Loss:
            def run(model: nn.Module) -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return loss(model)

            return run

        losses = [under_autocast(loss) for loss in plain]
    else:
        model = model.bfloat16()
    sketch = sketched(model, losses)
    assert all(layer.z.dtype == torch.float32 for layer in sketch.layers.values())
    assert_is(sketch, exact_gradients(model, sketch.names, losses, [1.0] * len(losses)), tolerance=2e-2)


class OddBlock(nn.Module):
    """A layer called twice, activations in place, dropout of both kinds, experts, a Conv1D called by keyword."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.twice, self.up, self.conv = nn.Linear(8, 8), nn.Linear(8, 12), Conv1D(8, 12)
        self.experts = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(3)])
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.use_reentrant = use_reentrant
        self.gradient_checkpointing = use_reentrant is not None

    def __call__(self, *args: Any) -> Any:
        if self.gradient_checkpointing and self.training:  # as transformers' GradientCheckpointingLayer does
            return checkpoint(super().__call__, *args, use_reentrant=self.use_reentrant)  # type: ignore[arg-type]
        return super().__call__(*args)

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        h = h + self.twice(self.act(self.twice(h)))
        h = F.dropout(h, 0.5, self.training)
        h = h + self.drop(self.conv(x=self.act(self.up(h))))
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):  # the third one never sees a token, and the second may see none
            chosen = tokens % 2 == i if i < 2 else torch.zeros_like(tokens, dtype=torch.bool)
            out[chosen] = expert(h[chosen]).tanh()
        return out


class Odd(nn.Module):
    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.block = OddBlock(use_reentrant)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(self.embedding(tokens).mul_(1.5), tokens)


TOKENS = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(0))
ODD_BATCHES = [TOKENS, TOKENS[:1, :4] // 2 * 2, TOKENS[1:, 2:]]
ODD_LOSSES: list[Loss] = [lambda model, batch=batch: model(batch).square().mean() for batch in ODD_BATCHES]


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["no-checkpoint", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("training", [False, True])
def test_odd_layers(training, use_reentrant):
    model = Odd(use_reentrant).train(training)
    sketch = sketched(model, ODD_LOSSES, exclude_modules=["block.experts.2"])
    assert_is(sketch, exact_gradients(model, sketch.names, ODD_LOSSES, [1.0] * 3))
    assert sketch.layers["block.twice"].tokens == 2 * sum(batch.numel() for batch in ODD_BATCHES)
    assert sketch.layers["block.experts.1"].updates < sketch.layers["block.experts.0"].updates == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_transformers_checkpointing(architecture, use_reentrant):
    model: Any = tiny_model(architecture, hidden_dropout=0.3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()
    losses, _ = losses_of(architecture)
    recomputed = []
    handle = model.get_submodule(GradientSketch(model).names[0]).register_forward_hook(lambda *_: recomputed.append(1))
    sketch = sketched(model, losses)
    handle.remove()
    assert len(recomputed) == 2 * len(losses)  # checkpointing was on indeed
    assert_is(sketch, exact_gradients(model, sketch.names, losses, [1.0] * len(losses)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_dropout_is_off_unless_asked_for(architecture):
    model = tiny_model(architecture, hidden_dropout=0.4).train()
    losses, _ = losses_of(architecture)
    sketch = sketched(model, losses)
    expected = exact_gradients(model, sketch.names, losses, [1.0] * len(losses))
    assert_is(sketch, expected)
    torch.manual_seed(0)
    with_dropout = sketched(model, losses, dropout=True)
    name = sketch.names[0]
    q, z = with_dropout.layers[name].factors()
    assert ((q @ z.t()).double() - expected[name]).norm() > 0.1 * expected[name].norm()


def test_dropout_in_functions_does_nothing():
    x = torch.randn(2, 3, 4, 5)
    expected = F.scaled_dot_product_attention(x, x, x)
    with taps._NoDropout():
        assert F.dropout(x, 0.9, training=True) is x and F.dropout2d(input=x, p=0.9, training=True) is x
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, dropout_p=0.9), expected)
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, None, 0.9), expected)


@pytest.mark.parametrize("sketching", [True, False])
def test_no_operation_of_a_pass_returns_anything_of_a_weights_size(sketching):
    n, tokens = 256, 40
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n))
    x = torch.randn(tokens, n)
    with GradientSketch(model, r=2) if sketching else contextlib.nullcontext():
        loss = (
            model(x).square().sum()
        )  # W0ᵀ is a view of the weight's size, and no allocation: backward alone is watched
        with Largest() as largest:
            loss.backward()
    assert largest.elements < n * n if sketching else largest.elements == n * n


def test_all_of_it_inside_autocast_is_what_it_is_outside():
    models = []
    losses, _ = losses_of("llama")
    for autocast in (False, True):
        model = tiny_model("llama")
        sketch = sketched(model, losses, width=8)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sketch.report()
            sketch.refine()
        with sketch:
            for loss in losses:
                loss(model).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fastlora.init_lora_ga(model, sketch, scale="weight_svd", norm_clip=0.5)
            fastlora.reinit_lora_ga(model, GradientSketch.combine([sketch]), max_rank=3)
        models.append(model.state_dict())
    for key, value in models[0].items():
        assert torch.equal(value, models[1][key]), key


class TwoTowers(nn.Module):
    """Names and texts, of different lengths, whose similarities are the loss: one backward through two forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up, self.down = nn.Embedding(50, 24), nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.down(self.up(self.embedding(tokens)).tanh()).mean(1), dim=-1)


def contrastive(tokens: list[Tensor]) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        names, *texts = (model(part) for part in tokens)
        similar = names @ torch.stack(texts).sum(0).t() / 0.1
        return F.cross_entropy(similar, torch.arange(len(names)))

    return loss


@pytest.mark.parametrize("forwards", [2, 5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_backward_through_several_forwards_is_the_gradient_of_its_loss(forwards, checkpointed):
    """Forwards of 2 to 90 tokens a row: weighted by them one by one, nobody has the sum's gradient."""
    generator = torch.Generator().manual_seed(0)
    losses: list[Loss] = []
    for _ in range(4):
        lengths = [2, *(30 * (i + 1) for i in range(forwards - 1))]
        losses.append(contrastive([torch.randint(0, 50, (6, n), generator=generator) for n in lengths]))
    model: Any = TwoTowers()
    if checkpointed:
        model.up.forward = lambda x, plain=model.up.forward: checkpoint(plain, x, use_reentrant=False)
    expected = exact_gradients(TwoTowers(), ["up", "down"], losses, [1.0] * 4)
    sketch = sketched(model, losses)
    assert_is(sketch, expected)
    assert sketch.total_weight == 4.0
    by_tokens = sketched(model, losses, weighting="tokens")  # all losses are over as many tokens
    tokens = 6.0 * (2 + sum(30 * (i + 1) for i in range(forwards - 1)))
    assert by_tokens.total_weight == 4 * tokens
    assert_is(by_tokens, {name: tokens * g for name, g in expected.items()})


@pytest.mark.parametrize("weighting", ["equal", "tokens"])
def test_only_passes_that_gave_something_count(weighting):
    model = TwoTowers()
    short, long = torch.arange(12).view(4, 3), torch.arange(36).view(4, 9)
    with GradientSketch(model, r=2, width=64, weighting=weighting) as sketch:
        model(long)  # a validation pass that nobody switched autograd off for
        with torch.no_grad():
            model(long)
        (model(long).sum() * math.nan).backward()
        model(short)[:, 0].sum().backward()
        one, two = model(short)[:, 1].sum(), model(short)[:, 2].sum()
        one.backward()
        two.backward()
    # Two forwards before two backwards: each counts by the tokens of both.
    assert sketch.total_weight == (3 if weighting == "equal" else 12 + 24 + 24)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_backward_counts_once(use_reentrant):
    model = Odd(use_reentrant).train()
    sketch = sketched(model, ODD_LOSSES, exclude_modules=["block.experts.2"])
    assert sketch.total_weight == 3.0
    sketch = sketched(model, ODD_LOSSES, exclude_modules=["block.experts.2"], weighting="tokens")
    weights = [float(batch.numel()) for batch in ODD_BATCHES]
    assert sketch.total_weight == sum(weights)
    assert_is(sketch, exact_gradients(model, sketch.names, ODD_LOSSES, weights))


@pytest.mark.parametrize(
    "args, kwargs, weight",
    [
        ((), {"input_ids": torch.ones(2, 5, dtype=torch.long)}, 10),
        ((), {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.eye(2, 5)}, 2),
        ((), {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([3, -100])}, 1),
        ((), {"labels": torch.full((2, 5), -100)}, 1),
        ((torch.ones(2, 5, dtype=torch.long),), {}, 10),
        ((torch.ones(2, 5, 7),), {}, 10),
        (("text",), {}, 1),
    ],
    ids=["tokens", "mask", "labels", "all-masked", "positional", "features", "no-tensor"],
)
def test_the_tokens_of_a_forward(args, kwargs, weight):
    assert taps.tokens_of(args, kwargs) == weight


class Quantised(nn.Linear):
    """A base that has no floating-point weight to differentiate, as 4-bit layers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.scale, self.bias)


def test_quantised_layers():
    model, x = Net(), torch.randn(4, 6)
    layers = {"head": model.head, "blocks.1.up": submodule(model, "blocks.1.up")}
    quantised: dict[str, Any] = {name: Quantised(layer) for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(quantised[name].weight * quantised[name].scale)
    losses: list[Loss] = [lambda m: m(x).square().sum()]
    expected = exact_gradients(model, list(layers), losses, [1.0])
    model.head, model.blocks[1].up = quantised["head"], quantised["blocks.1.up"]
    model.blocks[1].listed[0] = model.blocks[1].up  # type: ignore[union-attr,index]
    sketch = sketched(model, losses, target_modules=["head", "blocks.1.up"])
    assert_is(sketch, {name: expected[name] for name in sketch.names})


# What is left of the model.
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [Odd, lambda: Odd(True).train(), Net, lambda: Net().eval()])
def test_the_model_is_as_it_was(make, fails):
    model = make()
    next(model.children()).eval()  # flags that differ
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in parameters]
    state = ModelState(model)
    x = TOKENS if isinstance(model, Odd) else torch.randn(3, 4, 6)
    try:
        with GradientSketch(model):
            model(x).sum().backward()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    state.assert_unchanged()
    for parameter, grad in zip(parameters, grads):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, torch.ones_like(grad))
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_error_while_entering_leaves_the_model_as_it_was(monkeypatch):
    model = Odd(True).train()
    monkeypatch.setattr(model.block.experts[1], "register_forward_hook", lambda *_, **__: 1 / 0)
    state = ModelState(model)
    with pytest.raises(ZeroDivisionError), GradientSketch(model):
        pass
    state.assert_unchanged()
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_models_output_is_not_changed_inside():
    model = tiny_model("bert")
    batch = tiny_batch("bert")
    before = model(**batch).logits
    with GradientSketch(model):
        inside = model(**batch).logits
        with torch.no_grad():
            without_grad = model(**batch).logits
    assert torch.equal(inside, before) and torch.equal(without_grad, before)


def test_passes_of_several_contexts_add_up_and_none_is_active_twice():
    model = Net()
    x = torch.randn(4, 6)
    losses: list[Loss] = [lambda m: m(x).square().mean(), lambda m: m(x[:2]).mean()]
    sketch = GradientSketch(model, r=1, width=64)
    for loss in losses:
        with sketch:
            loss(model).backward()
            with pytest.raises(RuntimeError, match="active already"):
                sketch.__enter__()
    assert_is(sketch, exact_gradients(model, sketch.names, losses, [1.0, 1.0]))


def test_non_finite_passes_are_left_out():
    model = Odd()
    names = ["block.twice", "block.up", "block.conv"]
    sketch = GradientSketch(model, names, r=2, width=64)
    with sketch:
        ODD_LOSSES[0](model).backward()
        (ODD_LOSSES[1](model) * float("nan")).backward()
    assert_is(sketch, exact_gradients(model, names, ODD_LOSSES[:1], [1.0]))
    assert [layer.skipped for layer in sketch.layers.values()] == [1, 2, 1] or sketch.layers["block.twice"].skipped == 2


# Results.
def test_layers_without_a_gradient_are_named():
    model = Odd()
    sketch = sketched(model, ODD_LOSSES)
    assert not sketch.has_gradient("block.experts.2")
    with pytest.raises(ValueError, match=r"1 of 6 layers have no gradient: block\.experts\.2\. Run backward passes"):
        sketch.check_complete()
    with pytest.raises(ValueError, match=r"experts\.2"):
        sketch.refine()
    with GradientSketch(model, ["block.up"]) as nan:
        (ODD_LOSSES[0](model) * float("inf")).backward()
    with pytest.raises(ValueError, match="Those of 1 were not finite: lower the loss scale"):
        nan.check_complete()


def test_refining_uses_a_second_round_of_passes():
    model = tiny_model("llama")
    losses, _ = losses_of("llama")
    sketch = sketched(model, losses, width=6)
    expected = exact_gradients(model, sketch.names, losses, [1.0] * len(losses))

    def errors() -> Tensor:
        out = []
        for name, g in expected.items():
            u, s, vh = (part.double() for part in sketch.layers[name].svd(4))
            out.append((g - (u * s) @ vh).norm() / torch.linalg.svdvals(g)[4:].norm())
        return torch.stack(out)

    before = errors()
    with sketch.refine():
        for loss in losses:
            loss(model).backward()
    after = errors()
    assert before.max() > 1.05 and torch.all(after - 1 < 0.5 * (before - 1))
    assert [layer.tokens for layer in sketch.layers.values()] == [2 * 11 + 2 * 7 + 2 * 11] * len(expected)


def test_the_report_says_how_much_is_held():
    model = tiny_model("llama")
    losses, _ = losses_of("llama")
    sketch = sketched(model, losses, r=1, target_modules=["q_proj", "up_proj"])
    report = sketch.report()
    for line, (name, g) in zip(
        report.layers, exact_gradients(model, sketch.names, losses, [1.0] * len(losses)).items()
    ):
        sigma = torch.linalg.svdvals(g)
        assert (line.name, line.n, line.m, line.updates, line.tokens) == (name, *g.shape, 3, 58)
        assert line.norm == pytest.approx(g.norm().item(), rel=1e-3)
        assert line.captured == pytest.approx((sigma[:2].square().sum() / sigma.square().sum()).item(), rel=1e-3)
        assert line.error == pytest.approx((sigma[2:].norm() / sigma.norm()).item(), rel=1e-2)
        assert line.sigma == pytest.approx(sigma[:2].tolist(), rel=1e-3)
    table = report.table().splitlines()
    assert len(table) == 1 + len(report.layers) and "40×24" in table[2]
    (summary,) = str(report).splitlines()
    assert summary.startswith(f"{len(report.layers)} layers sketched, {len(report.layers)} with a gradient: 2r = 2")
    shares = [f"{100 * line.captured:.1f} % in {line.name}" for line in report.layers]
    assert sum(share in summary for share in shares) == 2  # the least and the most
    empty = str(GradientSketch(model).report()).splitlines()
    assert len(empty) == 2 and empty[1].endswith("and 11 more: no gradient")


def cancel(model: nn.Module, sketch: GradientSketch) -> None:
    x, other = torch.randn(2, 60, 24)
    target = torch.randn(2, 60, 30)
    with sketch:
        for sign, inputs, wanted in ((1.0, x, target[0]), (-1.0, x, target[0]), (0.02, other, target[1])):
            (sign * (model(inputs) * wanted).sum()).backward()


def test_passes_that_cancelled_are_a_warning_that_names_the_remedy():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 30))
    sketch = GradientSketch(model, r=2, width=6)
    cancel(model, sketch)
    message = (
        r"in 2 of 2 layers \(0, 1\) micro-batches cancelled.*run a round.*sketch\.refine\(\).*accumulate=\"signed\""
    )
    with pytest.warns(UserWarning, match="fastlora.GradientSketch.report: " + message):
        report = sketch.report()
    assert report.cancelled == ["0", "1"] and "0, 1: micro-batches cancelled, refine() the sketch" in str(report)
    with pytest.warns(UserWarning, match="fastlora.init_lora_ga: " + message):
        fastlora.init_lora_ga(copy.deepcopy(model), sketch)


@pytest.mark.parametrize("accumulate", ["signed", "components"])
def test_other_accumulations_are_saved_and_used(tmp_path, accumulate):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 30))
    sketch = GradientSketch(model, r=2, width=12, accumulate=accumulate)
    cancel(model, sketch)
    sketch.save(tmp_path / "sketch")
    back = GradientSketch.load(tmp_path / "sketch", model)
    assert back.accumulate == accumulate
    for name in sketch.names:
        one, other = sketch.layers[name].svd(4), back.layers[name].svd(4)
        assert torch.allclose((one[0] * one[1]) @ one[2], (other[0] * other[1]) @ other[2], atol=1e-4)
    assert list(fastlora.init_lora_ga(model, back)) == ["0", "1"]
    if accumulate == "components":
        with pytest.raises(ValueError, match='refine: accumulate: got "components", which has no refining'):
            back.refine()
        with pytest.raises(ValueError, match='combine: sketches: got some with accumulate="components"'):
            GradientSketch.combine([back, back])


@pytest.mark.parametrize("refined", [False, True])
def test_a_saved_sketch_comes_back(tmp_path, refined):
    model = Odd()
    sketch = sketched(model, ODD_LOSSES, width=6, exclude_modules=["block.experts.2"] if refined else None)
    if refined:
        with sketch.refine():  # the same passes, else the probes are of another gradient
            for loss in ODD_LOSSES:
                loss(model).backward()
    sketch.save(tmp_path / "sketch.safetensors")
    back = GradientSketch.load(tmp_path / "sketch.safetensors", Odd())
    assert (back.names, back.r, back.width) == (sketch.names, 2, 6)
    for name, layer in sketch.layers.items():
        mine, theirs = layer.svd(4), back.layers[name].svd(4)
        if refined:  # the factors are written in float32
            mine, theirs = ((torch.linalg.multi_dot((u, s.diag(), vh)),) for u, s, vh in (mine, theirs))
        for one, other in zip(mine, theirs):
            assert torch.allclose(one, other, rtol=0, atol=1e-6 * float(one.abs().max()) if refined else 0)
        assert back.layers[name].tokens == layer.tokens
        assert back.layers[name].squared_norm() == pytest.approx(layer.squared_norm(), rel=1e-2 if refined else 1e-5)
    assert back.has_gradient("block.experts.1")
    assert not back.has_gradient("block.experts.2")


def test_files_that_are_no_sketch_of_this_model(tmp_path):
    path = tmp_path / "sketch.safetensors"
    sketched(Net(), [lambda m: m(torch.randn(3, 6)).mean()]).save(path)
    with pytest.raises(ValueError, match=r"GradientSketch\.load: model: the sketch has layers .*blocks\.0\.conv"):
        GradientSketch.load(path, nn.ModuleDict({"head": nn.Linear(6, 3)}))
    other = Net()
    other.head = nn.Linear(7, 3)
    with pytest.raises(ValueError, match="the sketch has 'head' as 3×6, this Net as 3×7"):
        GradientSketch.load(path, other)
    with pytest.raises(FileNotFoundError):
        GradientSketch.load(tmp_path / "none.safetensors", Net())
    path.write_bytes(b"no sketch")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        GradientSketch.load(path, Net())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r: got 0, want an integer of at least 1"),
        ({"r": True}, "r: got True, want an integer of at least 1"),
        ({"r": 4, "width": 7}, "width: got 7, want an integer of at least 2r = 8"),
        ({"weighting": "rows"}, "weighting: got 'rows', want one of equal, tokens"),
        ({"accumulate": "mean"}, "accumulate: got 'mean', want one of sum, signed, components"),
        ({"target_modules": ["none"]}, r"target_modules: \['none'\] selects no linear layer of this Net"),
        ({"target_modules": "("}, r"GradientSketch: target_modules: got '\(', want a regular expression"),
        ({"exclude_modules": 3}, "GradientSketch: exclude_modules: got 3, want a string or a list of strings"),
    ],
)
def test_wrong_arguments(options, message):
    model = Net()
    state = ModelState(model)
    with pytest.raises(ValueError, match=message):
        GradientSketch(model, **options)
    state.assert_unchanged()


def test_a_sketch_wants_a_module():
    with pytest.raises(ValueError, match=r"model: got str, want a torch\.nn\.Module"):
        GradientSketch("model")  # type: ignore[arg-type]


def test_other_layers_of_a_peft_model_are_left_out():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["0", "1"]))  # type: ignore[arg-type]
    assert GradientSketch(adapted, r=1).names == ["base_model.model.1"]
