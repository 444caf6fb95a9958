# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# Attributes of modules are typed as tensors or modules; these tests know which they made.
"""`patch(mlp=...)`: what is recognised, what is left alone, and when a fused MLP runs its own forward all the same."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from problems import spied_mlps, through_the_function
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.layers import group as grouping
from fastlora.layers import mlp as mlps

K, N = 12, 20

the_function = pytest.fixture(autouse=True)(through_the_function)


@pytest.fixture
def fused_calls(monkeypatch):
    return spied_mlps(monkeypatch)


class Gated(nn.Module):
    def __init__(self, activation=nn.SiLU, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, N, bias=bias), nn.Linear(K, N, bias=bias)
        self.down_proj = nn.Linear(N, K, bias=bias)
        self.act_fn = activation()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """With a function for its activation, and a dropout between."""

    def __init__(self, p=0.0, activation=F.gelu):
        super().__init__()
        self.fc1, self.fc2, self.drop, self.act = nn.Linear(K, N), nn.Linear(N, K), nn.Dropout(p), activation

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class UpFirst(nn.Module):
    """Other names, up called first, no module for the activation, its settings in attributes."""

    def __init__(self, flag=True):
        super().__init__()
        self.a, self.b, self.c, self.flag = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K), flag

    def forward(self, x):
        one = self.a(x)
        return self.c(one * (F.relu(self.b(x)) if self.flag else self.b(x)))


class Odd(Gated):
    """`how` says what its forward does beside a gated MLP's."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "input":
            x = x * 1.0
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.how == "scale":
            h = h * 1.001
        if self.how == "training" and self.training:
            h = F.dropout(h, 0.5)
        if self.how == "twice":
            self.up_proj(x)
        if self.how == "none":
            return F.linear(h, self.down_proj.weight)
        return self.down_proj(h) + (x if self.how == "residual" else 0)


def patched(module, mode=True, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(module) if not isinstance(module, nn.Sequential) else module
    report = fastlora.patch(model, r=4, init_lora_weights=False, mlp=mode, **settings)
    return model, report


def step(model, x=None, run=None):
    """Output and every gradient."""
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1)) if x is None else x
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    y = (run or model)(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def own(model):
    """A copy of the model in which every module runs its own forward."""
    model = copy.deepcopy(model)
    for module in mlps.fused_mlps(model):
        mlps.release(module)
    return model


def assert_as_its_own(model, fused_calls, expected, run=lambda model: model):
    reference = own(model)
    want = step(reference, run=run(reference))
    assert fused_calls == []
    got = step(model, run=run(model))
    assert fused_calls == expected
    fused_calls.clear()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make, kind",
    [
        (Gated, "gated, silu"),
        (lambda: Gated(nn.GELU, bias=True), "gated, gelu"),
        (lambda: Gated(lambda: nn.GELU(approximate="tanh")), "gated, gelu_tanh"),
        (lambda: Gated(lambda: nn.ReLU(inplace=True)), "gated, relu"),
        (Plain, "plain, gelu"),
        (UpFirst, "gated, relu"),
        (lambda: nn.Sequential(nn.Linear(K, N), nn.SiLU(), nn.Linear(N, K), nn.Dropout(0.0)), "plain, silu"),
    ],
)
def test_recognises_by_what_forward_does(make, kind, fused_calls):
    model, report = patched(make())
    assert list(report.mlps.values()) == [kind] and "1 MLPs" in str(report)
    fused_calls.clear()
    assert_as_its_own(model, fused_calls, [kind.split(", ")[1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype, fused_calls):
    model, report = patched(Gated(nn.GELU).to(dtype))
    assert report.mlps == {"0": "gated, gelu"}
    fused_calls.clear()
    y = model(torch.randn(4, K, dtype=dtype))
    assert y.dtype == dtype and fused_calls == ["gelu"]


@pytest.mark.parametrize(
    "how, why",
    [
        ("input", "not given its input as it is"),
        ("scale", "is none of silu, gelu, gelu_tanh, relu"),
        ("training", "is none of silu, gelu, gelu_tanh, relu in training"),
        ("twice", "does not call each of its projections once"),
        ("none", "does not run with stand-ins"),
        ("residual", "does not run with stand-ins"),
    ],
)
def test_leaves_alone_what_does_something_else(how, why):
    model, report = patched(Odd(how))
    assert report.mlps == {} and why in report.mlps_left_alone["0"]
    assert type(model[0]) is Odd


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, lambda: nn.LeakyReLU(1e-3), lambda: nn.Hardswish()])
def test_leaves_other_activations_alone(activation):
    assert "is none of" in patched(Gated(activation))[1].mlps_left_alone["0"]


def test_leaves_alone_without_a_patched_last_projection_with_hooks_and_by_default():
    assert "down_proj, is not patched" in patched(Gated(), target_modules=["gate_proj"])[1].mlps_left_alone["0"]
    hooked = Gated()
    hooked.act_fn.register_forward_hook(lambda *_: None)
    assert "hooks" in patched(hooked)[1].mlps_left_alone["0"]
    report = patched(Gated(), mode=None)[1]
    assert (report.mlps, report.mlps_left_alone) == ({}, {})


@pytest.mark.parametrize("mode", ["yes", 1.5, []])
def test_wrong_mode(mode):
    with pytest.raises(ValueError, match="patch: mlp: got"):
        patched(Gated(), mode=mode)


def test_recognising_leaves_no_trace():
    module = Gated().train()
    module.act_fn.eval()
    model = nn.Sequential(module)
    fastlora.patch(model, r=4)
    before = {name: dict(child.__dict__) for name, child in model.named_modules()}
    state = torch.get_rng_state()
    assert isinstance(mlps.recognise(module), mlps.Recipe)
    assert torch.equal(torch.get_rng_state(), state)
    for name, child in model.named_modules():
        assert child.__dict__.keys() == before[name].keys() and child.training == before[name]["training"]


def change(model, what):
    module = model[0]
    if what == "hook on down":
        module.down_proj.register_forward_hook(lambda *_: None)
    elif what == "hook on the activation":
        module.act_fn.register_forward_pre_hook(lambda *_: None)
    elif what == "another activation":
        module.act_fn = nn.Tanh()
    elif what == "another approximation":
        module.act_fn.approximate = "tanh"
    elif what == "one more child":
        module.extra = nn.Identity()
    elif what == "merged":
        fastlora.merge(model)
    elif what == "another setting":
        module.flag = 3
    elif what == "disabled":
        module.down_proj.disable_adapters = True
    elif what == "several that drop":
        module.down_proj.add_adapter("second", 2, lora_dropout=0.5, init_lora_weights=False)
        module.down_proj.set_adapter(["default", "second"])
    elif what == "in a group":
        grouping.seat_together({"down": module.down_proj})


CHANGES = (
    "hook on down",
    "hook on the activation",
    "another activation",
    "another approximation",
    "one more child",
    "another setting",
    "disabled",
    "merged",
    "several that drop",
    "in a group",
)


@pytest.mark.parametrize("what", CHANGES)
def test_its_own_forward_runs_where_something_has_changed(what, fused_calls):
    model, _ = patched(Gated(nn.GELU))
    change(model, what)
    fused_calls.clear()
    assert_as_its_own(model, fused_calls, [])


def test_its_own_forward_runs_where_the_class_has_changed(fused_calls, monkeypatch):
    model, _ = patched(Gated())
    fused_calls.clear()
    monkeypatch.setattr(Gated, "forward", lambda self, x: x + 1)
    assert torch.equal(model(torch.zeros(2, K)), torch.ones(2, K)) and fused_calls == []


def test_its_own_forward_runs_while_a_dropout_between_drops(fused_calls):
    model, report = patched(Plain(0.5))
    assert report.mlps == {"0": "plain, gelu"}
    fused_calls.clear()
    assert_as_its_own(model, fused_calls, [])
    assert_as_its_own(model.eval(), fused_calls, ["gelu"])


def test_its_own_forward_runs_under_autocast_in_torch_func_and_for_keywords(fused_calls):
    model, _ = patched(Gated())
    fused_calls.clear()
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    torch.func.grad(lambda x: model(x).sum())(x)
    model[0](x=x)
    assert fused_calls == []


def test_auto_on_a_cpu_fuses_what_is_no_slower(fused_calls):
    for module, dtype, expected in [
        (Gated(), torch.float32, 1),
        (Plain(), torch.float32, 0),
        (Gated(), torch.bfloat16, 0),
    ]:
        model, report = patched(module.to(dtype), mode="auto")
        assert len(report.mlps) == 1
        fused_calls.clear()
        model(torch.randn(4, K, dtype=dtype))
        assert len(fused_calls) == expected


def test_hooks_and_adapters_of_gate_and_up_go_on_working(fused_calls):
    model, _ = patched(Gated())
    seen = []
    model[0].gate_proj.register_forward_hook(lambda module, args, out: seen.append(1) or out * 2)
    model[0].up_proj.disable_adapters = True
    fused_calls.clear()
    assert_as_its_own(model, fused_calls, ["silu"])
    assert len(seen) == 2


def test_dropout_draws_what_one_by_one_would(fused_calls):
    model, _ = patched(Gated(), lora_dropout=0.3)
    fused_calls.clear()
    assert_as_its_own(model, fused_calls, ["silu"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_and_groups(use_reentrant, fused_calls):
    model, report = patched(Gated(), group="auto")
    assert len(report.groups) == 1
    fused_calls.clear()
    assert_as_its_own(
        model, fused_calls, ["silu"] * 2, lambda model: lambda x: checkpoint(model, x, use_reentrant=use_reentrant)
    )


def test_copies_and_pickles_are_fused_too(fused_calls):
    model, _ = patched(Gated())
    want = step(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied[0], mlps.FusedMlp) and isinstance(copied[0], Gated)
        fused_calls.clear()
        assert all(torch.equal(one, other) for one, other in zip(step(copied), want, strict=True))
        assert len(fused_calls) == 1
        fastlora.unpatch(copied)
        assert type(copied[0]) is Gated and type(model[0]) is not Gated


def test_unpatch_restores_and_patching_twice_is_once():
    module = Gated()
    attributes = dict(module.__dict__)
    model, _ = patched(module)
    again = fastlora.patch(model, r=4, mlp=True)
    assert again.mlps == {"0": "gated, silu"} and type(module).__mro__.count(mlps.FusedMlp) == 1
    fastlora.unpatch(model)
    assert type(module) is Gated and module.__dict__.keys() == attributes.keys()
    assert type(module.down_proj) is nn.Linear


def test_compiles_as_its_own_forward():
    model, _ = patched(Gated())
    x = torch.randn(4, K)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), own(model)(x))


@pytest.mark.parametrize(
    "architecture, kind",
    [("llama", "gated, silu"), ("t5", "gated, gelu_tanh"), ("vit", "plain, gelu"), ("gpt2", "plain, gelu_tanh")],
)
def test_models(architecture, kind, fused_calls):
    model = tiny_model(architecture)
    report = fastlora.patch(model, r=4, init_lora_weights=False, mlp=True, group="auto")
    assert set(report.mlps.values()) == {kind} and len(report.mlps) >= 2
    reference = own(model)
    batch = tiny_batch(architecture)
    results = []
    for one in (reference, model):
        fused_calls.clear()
        loss = one(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in one.parameters() if p.requires_grad)])
    assert len(fused_calls) == len(report.mlps)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_modules_of_transformers():
    from types import SimpleNamespace

    from transformers.models.clip.modeling_clip import CLIPMLP
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.mistral.modeling_mistral import MistralMLP
    from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

    decoder = {"hidden_size": K, "intermediate_size": N, "hidden_activation": "gelu_pytorch_tanh"}
    t5 = {"d_model": K, "d_ff": N, "dropout_rate": 0.1}
    made = {
        "gemma": GemmaMLP(SimpleNamespace(**decoder, hidden_act="gelu_pytorch_tanh")),
        "mistral": MistralMLP(SimpleNamespace(**decoder, hidden_act="silu")),
        "t5": T5DenseActDense(SimpleNamespace(**t5, dense_act_fn="relu")),
        "t5 in bf16": T5DenseGatedActDense(SimpleNamespace(**t5, dense_act_fn="gelu_new")).bfloat16(),
        "clip": CLIPMLP(SimpleNamespace(**decoder, hidden_act="quick_gelu")),
    }
    report = fastlora.patch(nn.ModuleDict(made), r=4, mlp=True)
    assert report.mlps == {
        "gemma": "gated, gelu_tanh",
        "mistral": "gated, silu",
        "t5": "plain, relu",
        "t5 in bf16": "gated, gelu_tanh",
    }
    assert "is none of" in report.mlps_left_alone["clip"]


def test_unpatch_says_what_else_has_changed_a_class():
    model, _ = patched(Gated())
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    with pytest.raises(ValueError, match="'0' has become a Sharded since it was patched"):
        fastlora.unpatch(model)
    assert fastlora.is_patched(model)


def test_a_peft_model(fused_calls):
    peft = pytest.importorskip("peft")
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(Gated()), config)
    report = fastlora.patch(model, mlp=True)
    assert list(report.mlps.values()) == ["gated, silu"]
    x = torch.randn(3, K)
    fused_calls.clear()
    got = step(model, x)
    assert fused_calls == ["silu"]
    model.disable_adapter_layers()
    fused_calls.clear()
    disabled = model(x)
    assert fused_calls == []
    model.enable_adapter_layers()
    fastlora.unpatch(model)
    torch.testing.assert_close(got, step(model, x), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(disabled, model(x))
