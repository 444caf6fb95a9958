"""Every wrong call a user could make: the error says what came and what is wanted, and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_state import ModelState
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import FusedLoraLinear
from fastlora.functional import Adapter, lora_linear, multi_lora_linear

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)


def build() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"up": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "down": nn.Linear(8, 6), "conv": Conv1D(4, 6)}
    )
    model["down"].weight.requires_grad_(False)
    return model


def patched(**settings: Any) -> nn.ModuleDict:
    model = build()
    fastlora.patch(model, **({"r": 3, "lora_alpha": 6, "init_lora_weights": False} | settings))
    return model


def refused(call, *words: str, error: type[Exception] = ValueError) -> None:
    """The call raises, and its message has all of these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{message!r} does not say {missing}"


# patch
WRONG_SETTINGS = [
    ({"r": 0}, "r: got 0", "integer of at least 1"),
    ({"r": -4}, "r: got -4", "integer of at least 1"),
    ({"r": True}, "r: got True", "integer of at least 1"),
    ({"r": 8.0}, "r: got 8.0", "integer of at least 1"),
    ({"r": "8"}, "r: got '8'", "integer of at least 1"),
    ({"r": None}, "r: got None", "integer of at least 1"),
    ({"lora_alpha": NAN}, "lora_alpha: got nan", "finite number"),
    ({"lora_alpha": INF}, "lora_alpha: got inf", "finite number"),
    ({"lora_alpha": "16"}, "lora_alpha: got '16'", "finite number"),
    ({"lora_alpha": None}, "lora_alpha: got None", "finite number"),
    ({"lora_dropout": 1.0}, "lora_dropout: got 1.0", "[0, 1)"),
    ({"lora_dropout": -0.1}, "lora_dropout: got -0.1", "[0, 1)"),
    ({"lora_dropout": NAN}, "lora_dropout: got nan", "[0, 1)"),
    ({"lora_dropout": "0.1"}, "lora_dropout: got '0.1'", "[0, 1)"),
    ({"adapter_name": ""}, "adapter_name: got ''", "non-empty string without dots"),
    ({"adapter_name": "a.b"}, "adapter_name: got 'a.b'", "non-empty string without dots"),
    ({"adapter_name": "keys"}, "adapter_name: got 'keys'", "no attribute of nn.ParameterDict"),
    ({"adapter_name": "training"}, "adapter_name: got 'training'", "no attribute of nn.ParameterDict"),
    ({"adapter_name": 3}, "adapter_name: got 3", "non-empty string"),
    ({"init_lora_weights": "kaiming"}, "init_lora_weights: got 'kaiming'", 'want True, False, "gaussian"'),
    ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights: got 'pissa_niter_x'", '"pissa_niter_<iterations>"'),
    ({"init_lora_weights": None}, "init_lora_weights: got None", "want True, False"),
    ({"init_lora_weights": "orthogonal", "r": 3}, "r: got 3", "an even rank"),
    ({"init_lora_weights": "lora_ga"}, "needs gradients", "GradientSketch", "init_lora_ga"),
    ({"init_lora_weights": "eva"}, "needs data", "initialise with PEFT"),
    ({"init_lora_weights": "corda"}, "needs data", "initialise with PEFT"),
    ({"init_lora_weights": "pissa"}, "r: got 8, want at most 6", "'up'"),
    ({"init_lora_weights": "olora", "r": 7}, "r: got 7, want at most 6", "'up'"),
    ({"init_lora_weights": "pissa", "r": 2, "lora_alpha": 0}, "lora_alpha: got a scale of 0.0", "want a positive one"),
    ({"backend": "cuda"}, "backend: got 'cuda'", "auto, torch, cublas, triton"),
    ({"backend": None}, "backend: got None", "auto, torch, cublas, triton"),
    ({"target_modules": ["q_proj"]}, "target_modules: ['q_proj'] selects nothing", "called conv, down, up"),
    ({"target_modules": []}, "target_modules: [] selects nothing", "called conv, down, up"),
    ({"target_modules": "q_proj"}, "target_modules: 'q_proj' selects nothing", "called conv, down, up"),
    ({"target_modules": "u"}, "target_modules: 'u' selects nothing", "called conv, down, up"),
    ({"target_modules": "up,down"}, "A string is a regular expression", "want a list, ['up', 'down']"),
    ({"target_modules": ["dowm"]}, "['dowm'] selects nothing", "Did you mean 'down' for 'dowm'?"),
    ({"target_modules": ["norm"]}, "['norm'] selects nothing", "norm: LayerNorm is not a linear layer"),
    ({"target_modules": "*up"}, "target_modules: got '*up'", "regular expression", "nothing to repeat"),
    ({"exclude_modules": "(up"}, "exclude_modules: got '(up'", "regular expression"),
    ({"exclude_modules": r".*"}, "selects nothing"),
    ({"target_modules": None}, "target_modules: got None", "a string or a list of strings"),
    ({"target_modules": 3}, "target_modules: got 3", "a string or a list of strings"),
    ({"target_modules": [nn.Linear]}, "target_modules: got [<class", "a string or a list of strings"),
    ({"exclude_modules": ["up", 3]}, "exclude_modules: got ['up', 3]", "a string or a list of strings"),
    ({"target_modules": ["up", "typo"], "strict": True}, "no module is called 'typo'", "strict=True"),
    ({"target_modules": ["up", "norm"], "strict": True}, "strict=True", "'norm' cannot be patched", "LayerNorm"),
]


@pytest.mark.parametrize("settings, words", [(case[0], case[1:]) for case in WRONG_SETTINGS], ids=lambda v: str(v)[:50])
def test_wrong_settings(settings, words):
    model = build()
    before = ModelState(model)
    refused(lambda: fastlora.patch(model, **settings), "patch: ", *words)
    before.assert_unchanged()
    model = patched()
    before = ModelState(model)
    refused(lambda: fastlora.patch(model, **({"adapter_name": "second"} | settings)), "patch: ", *words)
    before.assert_unchanged()


@pytest.mark.parametrize("r", [2**62, 2**70])
def test_a_rank_beyond_memory(r):
    model = build()
    before = ModelState(model)
    with pytest.raises((RuntimeError, ValueError, TypeError, OverflowError, MemoryError)):
        fastlora.patch(model, r=r)
    before.assert_unchanged()


def test_a_model_without_linear_layers():
    model = nn.Sequential(nn.LayerNorm(4))
    refused(lambda: fastlora.patch(model), "selects nothing", "it has no linear layers")


NOT_MODULES = [None, "model", {"up": nn.Linear(2, 2)}, torch.zeros(2), nn.Linear]
FUNCTIONS = {
    "patch": fastlora.patch,
    "unpatch": fastlora.unpatch,
    "is_patched": fastlora.is_patched,
    "merge": fastlora.merge,
    "unmerge": fastlora.unmerge,
    "set_adapter": lambda model: fastlora.set_adapter(model, "default"),
    "disable_adapter": lambda model: fastlora.disable_adapter(model).__enter__(),
    "save_adapter": lambda model: fastlora.save_adapter(model, "somewhere"),
    "load_adapter": lambda model: fastlora.load_adapter(model, "somewhere"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("thing", NOT_MODULES, ids=lambda thing: type(thing).__name__)
def test_what_is_no_module(function, thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(
        lambda: FUNCTIONS[function](thing), f"{function}: model: got {type(thing).__name__}", "want a torch.nn.Module"
    )
    assert not list(tmp_path.iterdir())


OTHER_SETTINGS = [({"r": 4}, "r"), ({"lora_alpha": 7}, "lora_alpha"), ({"lora_dropout": 0.1}, "lora_dropout")]


@pytest.mark.parametrize("other, name", [*OTHER_SETTINGS, ({"use_rslora": True}, "use_rslora")])
def test_patching_twice_with_other_settings(other, name):
    model = patched()
    before = ModelState(model)
    again = {"r": 3, "lora_alpha": 6} | other
    refused(
        lambda: fastlora.patch(model, **again),
        f"patch: {name}: got {other[name]!r}",
        "'up' already has an adapter 'default'",
        "unpatch(model) first, or give another adapter_name",
    )
    before.assert_unchanged()


def test_other_settings_that_conflict_in_the_last_layer_only():
    model = build()
    fastlora.patch(model["conv"], r=2)
    before = ModelState(model)
    refused(lambda: fastlora.patch(model, r=3), "r: got 3", "'conv' already has", "r=2")
    before.assert_unchanged()


def test_unpatching_a_layer_that_was_parametrised_since():
    model = patched()
    torch.nn.utils.parametrizations.weight_norm(model["up"])
    before = ModelState(model)
    refused(
        lambda: fastlora.unpatch(model), "unpatch: 'up' has become a ParametrizedFusedLoraLinear", "undo that first"
    )
    before.assert_unchanged()
    torch.nn.utils.parametrize.remove_parametrizations(model["up"], "weight")
    fastlora.unpatch(model)
    assert type(model["up"]) is nn.Linear


# FusedLoraLinear
@pytest.mark.parametrize(
    "settings, words",
    [(case[0], case[1:]) for case in WRONG_SETTINGS if set(case[0]) <= {"r", "lora_alpha", "lora_dropout"}],
    ids=lambda v: str(v)[:40],
)
def test_a_layer_with_wrong_settings(settings, words):
    refused(lambda: FusedLoraLinear(4, 5, **settings), "FusedLoraLinear: ", *words)
    linear = nn.Linear(4, 5)
    before = ModelState(linear)
    refused(lambda: FusedLoraLinear.from_linear(linear, **settings), "FusedLoraLinear: ", *words)
    before.assert_unchanged()
    layer = FusedLoraLinear(4, 5)
    before = ModelState(layer)
    refused(lambda: layer.add_adapter("second", **settings), "FusedLoraLinear: ", *words)
    before.assert_unchanged()


@pytest.mark.parametrize("thing", [nn.Embedding(4, 5), Conv1D(4, 5), FusedLoraLinear(4, 5), None])
def test_from_linear_of_something_else(thing):
    refused(lambda: FusedLoraLinear.from_linear(thing), f"linear: got {type(thing).__name__}", "want a torch.nn.Linear")


def test_wrong_calls_of_a_layer():
    layer = FusedLoraLinear(4, 5)
    layer.add_adapter("second")
    before = ModelState(layer)
    refused(lambda: layer.add_adapter("second"), "add_adapter: name: 'second' is taken", "['default', 'second']")
    refused(lambda: layer.add_adapter("a.b"), "got 'a.b'", "without dots")
    refused(lambda: layer.add_adapter("third", init_lora_weights="no"), "init_lora_weights: got 'no'")
    refused(lambda: layer.set_adapter("third"), "set_adapter: name: got ['third']", "one of ['default', 'second']")
    refused(lambda: layer.set_adapter(["default", "third"]), "set_adapter: name: got ['third']")
    refused(lambda: layer.delete_adapter("third"), "delete_adapter: name: got ['third']")
    refused(lambda: layer.get_delta_weight("third"), "get_delta_weight: name: got ['third']")
    refused(lambda: layer.reset_adapter("default", "no"), "reset_adapter: init_lora_weights: got 'no'")
    refused(lambda: layer.reset_adapter("third"), "reset_adapter: name: got ['third']")
    before.assert_unchanged()
    layer.merge()
    before = ModelState(layer)
    refused(layer.merge, "['default'] are merged already", "unmerge")
    refused(lambda: layer.set_adapter("second"), "['default'] are merged", "unmerge")
    refused(lambda: layer.delete_adapter("default"), "'default' is merged", "unmerge")
    before.assert_unchanged()


# Adapters of a model
def test_adapter_names_that_do_not_exist():
    model = patched()
    fastlora.patch(model, adapter_name="second", target_modules=["up"])
    before = ModelState(model)
    for name in ("third", "", "Default", "default.", ["default", "third"], [], None, 3):
        refused(
            lambda name=name: fastlora.set_adapter(model, name),  # pyright: ignore
            f"set_adapter: adapter_name: got {name!r}",
            "want one or several of ['default', 'second']",
        )
    before.assert_unchanged()


def test_what_cannot_be_done_while_merged():
    model = patched()
    fastlora.patch(model, adapter_name="second")
    fastlora.merge(model)
    before = ModelState(model)
    refused(lambda: fastlora.merge(model), "merge: 'up'", "['default'] are merged already", "unmerge(model) first")
    refused(lambda: fastlora.set_adapter(model, "second"), "set_adapter: adapters are merged", "unmerge(model) first")
    before.assert_unchanged()
    fastlora.unmerge(model)
    fastlora.set_adapter(model, "second")


@pytest.mark.parametrize("function", ["merge", "unmerge", "set_adapter", "disable_adapter"])
def test_a_model_that_is_not_patched(function):
    model = build()
    before = ModelState(model)
    refused(
        lambda: FUNCTIONS[function](model),
        f"{function}: this ModuleDict has no LoRA layers",
        "call fastlora.patch(model) first",
    )
    before.assert_unchanged()


def test_a_bad_variable_in_the_environment(monkeypatch):
    model = patched()
    before = ModelState(model)
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    refused(lambda: model["up"](torch.randn(2, 6)), "FASTLORA_BACKEND='cuda'", "auto, torch, cublas, triton")
    before.assert_unchanged()


# Tensors that do not fit
X, W, A, B, BIAS = (6, 5), (7, 5), (3, 5), (7, 3), (7,)


def call(x: Any = X, weight: Any = W, lora_A: Any = A, lora_B: Any = B, bias: Any = BIAS, **more: Any) -> Tensor:
    """`lora_linear` with zeros of these shapes, or with these tensors."""
    tensors = [torch.zeros(t) if isinstance(t, tuple) else t for t in (x, weight, lora_A, lora_B, bias)]
    x, weight, lora_A, lora_B, bias = tensors
    return lora_linear(x, weight, lora_A, lora_B, **({"scaling": 1.0, "bias": bias} | more))


def meta(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, device="meta")


WRONG_CALLS = {
    "x too wide": ({"x": (6, 4)}, "shapes: got x (6, 4)", "want x (..., K)"),
    "weight the other way round": ({"weight": (5, 7)}, "weight (5, 7)", "weight (N, K)"),
    "A the other way round": ({"lora_A": (5, 3)}, "lora_A (5, 3)", "lora_A (r, K)"),
    "B the other way round": ({"lora_B": (3, 7)}, "lora_B (3, 7)", "lora_B (N, r)"),
    "other ranks": ({"lora_A": (4, 5)}, "lora_A (4, 5), lora_B (7, 3)"),
    "rank 0": ({"lora_A": (0, 5), "lora_B": (7, 0)}, "lora_A (0, 5)", "r >= 1"),
    "bias": ({"bias": (5,)}, "bias: got shape (5,)", "want (7,)"),
    "bias of two dimensions": ({"bias": (1, 7)}, "bias: got shape (1, 7)", "want (7,)"),
    "x a number": ({"x": ()}, "x 0-D", "at least 1-D"),
    "weight a vector": ({"weight": (5,)}, "weight 1-D", "2-D"),
    "stacked A": ({"lora_A": (2, 3, 5)}, "lora_A 3-D", "2-D"),
    "x on meta": ({"x": meta(X)}, "devices: got x on meta", "weight on cpu", "model.to(device)"),
    "weight on meta": ({"weight": meta(W)}, "weight on meta", "model.to(device)"),
    "A on meta": ({"lora_A": meta(A)}, "lora_A on meta", "model.to(device)"),
    "B on meta": ({"lora_B": meta(B)}, "lora_B on meta", "model.to(device)"),
    "bias on meta": ({"bias": meta(BIAS)}, "bias on meta", "model.to(device)"),
    "integer x": ({"x": torch.zeros(X, dtype=torch.int64)}, "x torch.int64", "floating-point"),
    "integer A": ({"lora_A": torch.zeros(A, dtype=torch.int64)}, "lora_A torch.int64", "floating-point"),
    "half x": ({"x": torch.zeros(X, dtype=torch.float16)}, "x torch.float16, weight torch.float32", "want one dtype"),
    "half bias": ({"bias": torch.zeros(BIAS, dtype=torch.bfloat16)}, "bias torch.bfloat16", "want one dtype"),
    "int8 weight": ({"weight": torch.zeros(W, dtype=torch.int8)}, "weight torch.int8", "want one dtype"),
    "dropout 1.5": ({"dropout_p": 1.5}, "dropout_p: got 1.5", "[0, 1]"),
    "dropout nan": ({"dropout_p": NAN}, "dropout_p: got nan", "[0, 1]"),
    "dropout below 0 in eval mode": ({"dropout_p": -0.5, "training": False}, "dropout_p: got -0.5", "[0, 1]"),
    "backend": ({"backend": "cuda"}, "backend: got 'cuda'", "auto, torch, cublas, triton"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_wrong_calls_of_lora_linear(case, grad):
    arguments, *words = WRONG_CALLS[case]
    with torch.set_grad_enabled(grad):
        refused(lambda: call(**arguments), *words)
    assert call().shape == (6, 7)


def test_wrong_adapters_of_multi_lora_linear():
    x, weight = torch.zeros(X), torch.zeros(W)
    good, bad = Adapter(torch.zeros(A), torch.zeros(B), 1.0), Adapter(torch.zeros(A), torch.zeros(3, 7), 1.0)
    refused(lambda: multi_lora_linear(x, weight, [good, bad]), "lora_B (3, 7)", "lora_B (N, r)")
    refused(lambda: multi_lora_linear(x, weight, [good, good._replace(lora_A=meta(A))]), "lora_A on meta")


def test_inputs_that_do_not_fit_a_patched_model():
    model = patched()
    before = ModelState(model)
    refused(lambda: model["up"](torch.randn(2, 5)), "got x (2, 5), weight (8, 6)", "x (..., K)")
    refused(lambda: model["conv"](torch.randn(2, 5)), "got x (2, 5), weight (4, 6)", "x (..., K)")
    refused(lambda: model["up"](torch.ones(2, 6, dtype=torch.int64)), "x torch.int64", "floating-point")
    refused(lambda: model["up"](torch.randn(2, 6, device="meta")), "x on meta", "model.to(device)")
    refused(lambda: model["up"](torch.randn(2, 6).half()), "x torch.float16, weight torch.float32", "one dtype")
    before.assert_unchanged()
