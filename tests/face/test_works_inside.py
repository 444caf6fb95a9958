"""Patched models inside what people wrap training in, against the unpatched computation of the same numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import PATHS, path
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FusedLoraLinear

WIDTH = 24
EXACT = torch.float64  # where nothing else is said, so that a difference is a mistake and no rounding
DROPOUT = 0.25


@pytest.fixture(params=PATHS, autouse=True)
def either_path(request):
    with path(request.param):
        yield


class EagerLora(nn.Module):
    """The same layer written in eager PyTorch, sharing the fused one's parameters."""

    def __init__(self, fused: FusedLoraLinear) -> None:
        super().__init__()
        self.base = nn.Linear(fused.in_features, fused.out_features, bias=fused.bias is not None)
        self.base.weight, self.base.bias = fused.weight, fused.bias
        self.lora_A, self.lora_B = fused.lora_A, fused.lora_B
        self.scaling, self.dropout = fused.scaling["default"], fused.lora_dropout["default"]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A["default"].to(x.dtype), self.lora_B["default"].to(x.dtype)
        if torch.is_autocast_enabled(x.device.type):
            a, b = self.lora_A["default"], self.lora_B["default"]
        return self.base(x) + self.scaling * F.linear(F.linear(F.dropout(x, self.dropout, self.training), a), b)


class Block(nn.Module):
    """Linear layers and what surrounds them: a norm, an activation in place, residuals; one layer is used twice."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.twice = nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.act(self.up(self.norm(x))))
        return x + self.twice(self.act(self.twice(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def patched(dtype: torch.dtype = EXACT, dropout: float = DROPOUT, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = Model().to(dtype)
    fastlora.patch(model, r=4, lora_dropout=dropout, init_lora_weights=False, **settings)
    return model


def eager(model: nn.Module) -> Any:
    """The model's twin in eager PyTorch; it shares nothing with it."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FusedLoraLinear):
                setattr(module, name, EagerLora(child))
    return twin.train(model.training)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' gradients, under the names of the patched model."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(
    model: nn.Module, x: Tensor, forward: Any = None, seed: int = 3
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Output, x's gradient and the adapters' gradients of one training step."""
    model.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    y = (forward or model)(x)
    y.float().square().mean().backward()
    return y.detach(), x.grad, gradients(model)


def inputs(*shape: int, dtype: torch.dtype = EXACT, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*(shape or (3, 5, WIDTH)), generator=generator).to(dtype)
    return x.requires_grad_() if requires_grad else x


def assert_close(got, want, **tolerance) -> None:
    assert got[2].keys() == want[2].keys() and len(got[2]) >= 1
    torch.testing.assert_close(got[0], want[0], **tolerance)
    if want[1] is not None:
        torch.testing.assert_close(got[1], want[1], **tolerance)
    for name, gradient in want[2].items():
        torch.testing.assert_close(got[2][name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_equal(got, want) -> None:
    assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_step_is_eager_pytorch_s(requires_grad, dropout):
    """Dropout included: the masks are the same, drawn in the same order."""
    model = patched(dropout=dropout)
    x = inputs(requires_grad=requires_grad)
    assert_close(step(model, x), step(eager(model), x))


# Precision.
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(base, adapters, dtype):
    """Base and adapters of any dtype; the backward pass is outside of the context."""
    model = smooth(patched(torch.float32, dropout=0.0))
    for layer in (m for m in model.modules() if isinstance(m, FusedLoraLinear)):
        layer.to(base)
        layer.lora_A.to(adapters)
        layer.lora_B.to(adapters)
    x = inputs(32, WIDTH, dtype=torch.float32)

    def within(module):
        def forward(x):
            with torch.autocast("cpu", dtype):
                return module(x)

        return forward

    twin = eager(model)
    got, theirs = step(model, x, within(model)), step(twin, x, within(twin))
    assert got[0].dtype == dtype
    assert_as_right_as(theirs, got, exact_step(model, x))


def smooth(model: Any) -> Any:
    """The model without ReLUs, which rounding may turn on and off."""
    for block in model.blocks:
        block.act = nn.Tanh()
    return model


def exact_step(model: nn.Module, x: Tensor, seed: int = 3):
    """The step in fp64, starting from the same rounded parameters."""
    return step(eager(model).double(), x.double(), seed=seed)


def assert_as_right_as(theirs, ours, exact) -> None:
    """The same dtypes as eager PyTorch's, and errors of at most twice its own, plus a rounding."""
    assert ours[2].keys() == theirs[2].keys() == exact[2].keys()
    triples = [(ours[i], theirs[i], exact[i]) for i in (0, 1) if exact[i] is not None]
    for got, eagers, truth in triples + [(ours[2][n], theirs[2][n], exact[2][n]) for n in exact[2]]:
        assert got.dtype == eagers.dtype
        rounding = 0.5 * torch.finfo(ours[0].dtype).eps * truth.norm()
        assert (got.double() - truth).norm() <= 2 * (eagers.double() - truth).norm() + rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cast_after_patching(dtype):
    """`.half()`, `.bfloat16()`, `.float()` and back to `.double()` take the adapters along."""
    model = smooth(patched(dropout=0.0))
    {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float32: model.float}[dtype]()
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = inputs(dtype=dtype, requires_grad=True)
    got = step(model, x)
    assert_as_right_as(step(eager(model), x), got, exact_step(model, x))
    assert {g.dtype for g in got[2].values()} == {dtype}
    model.double()
    assert_close(step(model, inputs()), step(eager(model), inputs()))


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_grad_scaler(scale):
    """On the CPU in fp16: unscaled gradients are those without a scaler, an overflow skips the step."""
    model = patched(torch.float16, dropout=0.0)
    want = step(model, inputs(dtype=torch.float16))[2]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.zero_grad()
    scaler.scale(model(inputs(dtype=torch.float16)).float().square().mean()).backward()
    scaler.unscale_(optimiser)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=0.02, atol=2e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scaler.step(optimiser)
    scaler.update()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser.zero_grad()
    scaler.scale(model(inputs(dtype=torch.float16)).float().square().mean() * 1e30).backward()
    scaler.step(optimiser)
    scaler.update()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert scaler.get_scale() == scale / 2


# Recomputation and modes without gradients.
@pytest.mark.parametrize("use_reentrant, requires_grad", [(False, False), (False, True), (True, True)])
def test_activation_checkpointing(use_reentrant, requires_grad):
    """Every block recomputed, dropout on: the same bits as without, the masks being drawn again from the same state."""
    model = patched()
    x = inputs(requires_grad=requires_grad)

    def forward(x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.head(x)

    assert_equal(step(model, x, forward), step(model, x))


# Training.
def test_gradient_accumulation():
    """Two half batches give the sum, and the gradients of the first are not overwritten by the second."""
    model = patched(dropout=0.0)
    twin = eager(model)
    x = inputs()
    for module in (model, twin):
        for part in x.split(1):
            module(part).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(twin))


def test_everything_trained():
    """The base too: its weight and bias get their gradients."""
    model = patched().requires_grad_(True)
    got, want = step(model, inputs()), step(eager(model), inputs())
    want = (want[0], want[1], {name.replace(".base.", "."): value for name, value in want[2].items()})
    assert "blocks.0.up.weight" in got[2] and "blocks.0.up.bias" in got[2]
    assert_close(got, want)


# Copies, replicas, devices, files.
def replicate(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes for one device: modules without parameters, holding non-leaf tensors."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    shared = {parameter: parameter * 1 for parameter in model.parameters()}
    for module in modules:
        for name, child in module._modules.items():
            copies[module]._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            setattr(copies[module], name, None if parameter is None else shared[parameter])
    return copies[model]


@pytest.mark.parametrize("merged", [False, True])
def test_data_parallel_replicas(merged):
    """Gradients flow through the replica's copies to the model's own parameters."""
    model = patched()
    if merged:
        fastlora.merge(model)
        with torch.no_grad():
            assert torch.equal(replicate(model)(inputs()), model(inputs()))
        return
    want = step(model, inputs())
    assert_equal(step(model, inputs(), replicate(model)), want)
    replica: Any = replicate(model)
    assert not list(replica.parameters()) and type(replica.head) is FusedLoraLinear


def test_functional_call():
    """Parameters swapped in by name, as torch.func does it, and their gradients by torch.func.grad."""
    model = patched(dropout=0.0)
    other = {name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters() if p.requires_grad}

    def loss(adapters):
        return torch.func.functional_call(model, adapters, (inputs(),)).square().mean()

    got = torch.func.grad(loss)(other)
    model.load_state_dict(other, strict=False)
    torch.testing.assert_close(loss({}), loss(other))
    want = step(eager(model), inputs())[2]
    torch.testing.assert_close(got, want)


def test_from_the_meta_device():
    """Built and patched on meta, run there for shapes, then given memory and weights."""
    with torch.device("meta"):
        model = Model().to(EXACT)
    fastlora.patch(model, r=4, lora_dropout=DROPOUT)
    assert all(p.is_meta for p in model.parameters())
    y = model(inputs().to("meta"))
    assert y.is_meta and y.shape == (3, 5, 7)
    source = patched()
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    assert_equal(step(model, inputs()), step(source, inputs()))
    for module in model.modules():
        if isinstance(module, (FusedLoraLinear, nn.LayerNorm)):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    fastlora.unpatch(model)
    fresh = Model().to(EXACT)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(inputs()), model(inputs()))


# Other shapes of models.
def test_modules_in_plain_lists_and_parameters_in_lists():
    """A layer that the model also keeps in a plain list stays the same object, and so does its weight."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.order = [self.second, self.first]
            self.weights = [self.first.weight]
            self.extra = nn.ParameterList([nn.Parameter(torch.ones(WIDTH))])

        def forward(self, x):
            for layer in self.order:
                x = layer(x) * self.extra[0]
            return x

    model = Listed().to(EXACT)
    fastlora.patch(model, r=4, init_lora_weights=False)
    assert all(isinstance(layer, FusedLoraLinear) for layer in model.order)
    assert model.weights[0] is model.first.weight and not model.extra[0].requires_grad
    y, _, grads = step(model, inputs())
    twin = eager(model)
    want = twin.first(twin.second(inputs()))
    torch.testing.assert_close(y, want)
    assert len(grads) == 4


def test_a_weight_tied_to_an_embedding():
    """The head runs fused on the embedding's own weight; the embedding is left alone."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, WIDTH)
            self.head = nn.Linear(WIDTH, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    model = Tied().to(EXACT)
    fastlora.patch(model, r=4, init_lora_weights=False)
    assert model.head.weight is model.embedding.weight
    tokens = torch.arange(11)
    y = model(tokens)
    torch.testing.assert_close(y, eager(model)(tokens))
    y.sum().backward()
    assert model.embedding.weight.grad is None
    fastlora.merge(model)
    torch.testing.assert_close(model(tokens), y)
    fastlora.unmerge(model)
    assert torch.equal(model(tokens), y)


@pytest.mark.parametrize("gradients_on", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torch_s_own_transformer_layer(training, gradients_on):
    """Its attention reads its projection's weight itself, so that is left alone. In eval mode it would read the linear
    layers' weights too, past their adapters, were there no hook."""
    torch.manual_seed(0)
    model: Any = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, dtype=EXACT)
    x = inputs()
    want = copy.deepcopy(model)(x)
    report = fastlora.patch(model, r=4)
    assert report.patched == ["linear1", "linear2"] and "self_attn.out_proj" in report.left_alone
    model.train(training)
    torch.testing.assert_close(model(x), want)
    for layer in (model.linear1, model.linear2):
        nn.init.normal_(layer.lora_B["default"], std=0.2)
    with torch.set_grad_enabled(gradients_on):
        y = model(x)
    torch.testing.assert_close(y.detach(), eager(model).train()(x).detach())
    assert not torch.allclose(y, want, atol=0.01)
    for merged in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(merged(x), y)
        fastlora.merge(merged)
        torch.testing.assert_close(merged(x), y)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torch_s_own_encoder_packs_padded_input():
    """In eval mode nn.TransformerEncoder makes a nested tensor of a padded batch: layers take it, as nn.Linear does."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, dtype=EXACT)
    model = nn.TransformerEncoder(layer, 2)
    fastlora.patch(model, r=4, init_lora_weights=False)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    want = eager(model)(inputs(), src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        y = model(inputs(), src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], want.detach()[~padding])
    assert not y[padding].any()
