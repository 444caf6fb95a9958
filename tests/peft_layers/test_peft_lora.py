"""Models that carry PEFT LoRA layers: patched against the same model unpatched, with the same seeds.

On a CPU the dropout masks are then the same too.
"""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_problems import (
    K,
    Mlp,
    N,
    adalora_model,
    assert_agree,
    assert_within_twice_in_bf16,
    calm,
    counts,
    dora_model,
    fused_layers,
    left_alone,
    patched_copy,
    peft_model,
    predicted,
    run,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fastlora
from fastlora.integrations.peft.adopt import adopt

KINDS = {"lora": peft_model, "dora": dora_model, "adalora": adalora_model}
CONFIGS = {"plain": {}, "rslora": {"use_rslora": True}, "odd": {"r": 7, "lora_alpha": 3}}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind, config", [*((kind, c) for kind in ("lora", "dora") for c in CONFIGS), ("adalora", "plain")]
)
def test_same_outputs_and_gradients(kind, config, bias, dropout):
    dtype, tolerance = (torch.float64, 1e-12) if kind == "dora" else (torch.float32, 1e-6)
    model = KINDS[kind](Mlp(bias, dtype), lora_dropout=dropout, **CONFIGS[config])
    fused = patched_copy(model)
    x = torch.randn(2, 5, K, dtype=dtype)
    assert_agree(model, fused, x, tolerance)
    assert_agree(model.eval(), fused.eval(), x, tolerance)
    assert counts(fused) == [2, 2]
    assert not any(predicted(layer) for layer in fused_layers(fused))
    with torch.no_grad():
        assert torch.allclose(model(x), fused(x), atol=1e-6)


def test_lora_bias_folds_into_the_bias():
    model = peft_model(lora_bias=True, lora_dropout=0.2)
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.lora_B["default"].bias.data.normal_()  # type: ignore[operator]
    fused = patched_copy(model)
    assert_agree(model, fused, torch.randn(6, K))
    assert counts(fused) == [1, 1]
    with pytest.warns(UserWarning, match="no bias"):
        model = peft_model(Mlp(bias=False), lora_bias=True)
    fused = patched_copy(model)
    assert_agree(model, fused, torch.randn(6, K))
    with pytest.raises(RuntimeError, match="no bias to merge"):
        fused.merge_adapter()


def test_trained_base_bias_gets_its_gradient():
    model = peft_model(bias="lora_only")
    assert_agree(model, patched_copy(model), torch.randn(6, K))


def test_only_a_or_only_b_is_trained():
    for frozen in ("lora_A", "lora_B"):
        model = peft_model(lora_dropout=0.1)
        for name, parameter in model.named_parameters():
            if frozen in name:
                parameter.requires_grad_(False)
        assert_agree(model, patched_copy(model), torch.randn(6, K))


def test_fp32_adapters_on_a_bf16_base():
    model = peft_model(Mlp(dtype=torch.bfloat16), r=8)
    fused = patched_copy(model)
    grads = assert_within_twice_in_bf16(model, fused, torch.randn(64, K, dtype=torch.bfloat16))
    assert counts(fused) == [1, 1]
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.2, 0.0, 0.3), (0.2, 0.4, 0.1)])
def test_several_active_adapters(dropouts):
    model = peft_model(lora_dropout=dropouts[0])
    for name, r, dropout in (("second", 3, dropouts[1]), ("third", 5, dropouts[2])):
        config = peft.LoraConfig(
            r=r, lora_alpha=2, lora_dropout=dropout, target_modules=["up"], init_lora_weights=False
        )
        model.add_adapter(name, config)
    fused = patched_copy(model)
    for both in (model, fused):
        both.base_model.set_adapter(["default", "second", "third"])
    x = torch.randn(3, 4, K)
    if dropouts[1:] == (0.0, 0.3):
        # Adapters without dropout are run as one, and those with it draw their masks in the same order.
        assert_agree(model, fused, x)
    assert_agree(model, fused, x)
    assert_agree(model.eval(), fused.eval(), x)
    assert min(counts(fused)) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_conv1d(kind):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    base = GPT2LMHeadModel(config)
    chosen = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True, "lora_dropout": 0.1}
    model = calm(KINDS[kind](base, **chosen))
    fused = patched_copy(model)
    ids = torch.randint(0, 50, (2, 7))
    outcomes = []
    for each in (model, fused):
        torch.manual_seed(3)
        loss = each(input_ids=ids, labels=ids).loss  # AdaLoRA's with PEFT's penalty
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
    for theirs, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert counts(fused) == [1] * 4
    weights = [layer.weight.clone() for layer in fused_layers(fused)]
    want = fused.eval()(input_ids=ids).logits
    fused.merge_adapter()
    torch.testing.assert_close(fused(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    fused.unmerge_adapter()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(fused_layers(fused), weights, strict=True))


def test_disabled_merged_and_absent_adapters_run_the_base_layer():
    model = peft_model()
    fused = patched_copy(model)
    x = torch.randn(4, K)
    with fused.disable_adapter():
        assert torch.equal(fused(x), _without_adapters(model, x))
    assert counts(fused, "base") == [1, 1]
    want = fused(x)
    fused.merge_adapter()
    assert torch.allclose(fused(x), want, atol=1e-6)
    assert counts(fused, "base") == [2, 2]
    with fused.disable_adapter():  # PEFT unmerges at the first call
        assert torch.equal(fused(x), _without_adapters(model, x))
    assert not any(layer.merged for layer in fused_layers(fused))
    model.add_adapter("narrow", peft.LoraConfig(target_modules=["up"], init_lora_weights=False))
    fused = patched_copy(model)
    for both in (model, fused):
        both.set_adapter("narrow")
    assert_agree(model, fused, x)
    assert counts(fused) == [1, 0]
    assert counts(fused, "base") == [0, 1]


def _without_adapters(model, x):
    with model.disable_adapter():
        return model(x)


def test_deepcopy_pickle_and_unpatch():
    model = peft_model(lora_dropout=0.1)
    fused = patched_copy(model)
    x = torch.randn(5, K)
    assert_agree(model, copy.deepcopy(fused), x)
    reborn = pickle.loads(pickle.dumps(fused))
    assert len(fused_layers(reborn)) == 2
    assert_agree(model, reborn, x)
    fused(x)
    fastlora.unpatch(fused)
    assert not fused_layers(fused)
    for (name, ours), (theirs_name, theirs) in zip(fused.named_modules(), model.named_modules(), strict=True):
        assert (name, type(ours)) == (theirs_name, type(theirs))
        assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert fused.state_dict().keys() == model.state_dict().keys()


def test_unpatched_while_merged_is_what_peft_alone_would_have_made():
    model = peft_model(Mlp(dtype=torch.bfloat16))
    fused = patched_copy(model)
    fused.merge_adapter()
    model.merge_adapter()
    fastlora.unpatch(fused)
    assert fused.base_model.model.up.merged_adapters == ["default"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, fused.state_dict()[name]), name


def test_autocast_bf16():
    model = peft_model(lora_dropout=0.0)
    fused = patched_copy(model)
    assert_within_twice_in_bf16(model, fused, torch.randn(64, K), autocast=True)
    assert counts(fused) == [1, 1]


# What is left to PEFT's forward.
def assert_falls_back(model, fused, reason, x=None, layers=2, **kwargs):
    x = torch.randn(5, K) if x is None else x
    assert_agree(model, fused, x, **kwargs)
    found = [layer for layer in fused_layers(fused) if any(reason in why for why in layer.calls.fallback)]
    assert len(found) == layers
    assert all(reason in layer.calls.last_reason for layer in found)
    return found


def test_other_variants_fall_back():
    """aLoRA's; DoRA's are fused (test_peft_dora.py)."""
    model = peft_model(alora_invocation_tokens=[1])
    fused = patched_copy(model)
    assert_falls_back(model, fused, "variant ALoraLinearVariant")
    assert predicted(fused_layers(fused)[0]) == "variant ALoraLinearVariant"


def test_adapter_names_of_a_mixed_batch_are_fused():
    model = peft_model().eval()
    model.add_adapter("second", peft.LoraConfig(target_modules=["up"], init_lora_weights=False))
    model.eval()
    fused = patched_copy(model)
    names = ["default", "second", "__base__", "default", "second"]
    assert_agree(model, fused, torch.randn(5, K), adapter_names=names)
    assert all(layer.calls.fused == 1 and not layer.calls.fallback for layer in fused_layers(fused))


def test_hooks_inside_the_layer_fall_back_and_run():
    for path, reason in (("base_layer", "hooks on the base layer"), ("lora_A.default", "hooks on lora_A")):
        fused = patched_copy(peft_model())
        plain = peft_model()
        seen = []
        layer = fused_layers(fused)[0]
        handle = layer.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        assert reason in predicted(layer)
        assert_falls_back(plain, fused, reason, layers=1)
        assert seen == [1]
        handle.remove()
        assert not predicted(layer)


def test_a_global_hook_sees_the_modules_inside():
    fused = patched_copy(peft_model())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        fused(torch.randn(5, K))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6
    assert fused_layers(fused)[0].calls.fallback == {"global module hooks": 1}


def test_a_replaced_forward_falls_back():
    model = peft_model()
    fused = patched_copy(model)
    layer = fused_layers(fused)[0]
    plain_forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: plain_forward(x) + 1.0
    base = model.base_model.model.up.base_layer
    base.forward = lambda x: nn.Linear.forward(base, x) + 1.0
    assert_falls_back(model, fused, "its forward replaced", layers=1)


def test_the_input_s_dtype_falls_back():
    model = peft_model(Mlp(dtype=torch.bfloat16))
    fused = patched_copy(model)
    for each in (model, fused):  # as PEFT: the base layer refuses
        with pytest.raises(RuntimeError, match="dtype"):
            each(torch.randn(5, K))
    assert fused_layers(fused)[0].calls.last_reason == "torch.float32 input into a torch.bfloat16 base layer"
    with disable_input_dtype_casting(fused):
        with pytest.raises(RuntimeError, match="dtype"):
            fused(torch.randn(5, K, dtype=torch.bfloat16))
    assert "casting the input is disabled" in (fused_layers(fused)[0].calls.last_reason or "")


def test_replaced_submodules_fall_back():
    class Loud(nn.Dropout):
        def forward(self, input):
            return 2 * input

    model = peft_model(lora_dropout=0.1)
    model.base_model.model.up.lora_dropout["default"] = Loud()
    fused = patched_copy(model)
    assert_falls_back(model, fused, "lora_dropout is a Loud", layers=1)
    for each in (model, fused):
        each.base_model.model.down.scaling["default"] = torch.tensor(1.5)
    assert_falls_back(model, fused, "scaling is a Tensor", layers=1)


def test_layers_left_alone_by_class():
    model = peft_model(nn.Sequential(nn.Embedding(5, K), nn.Linear(K, N)), target_modules=["0", "1"])
    embedding, linear = model.base_model.model
    assert "lora.layer.Embedding" in left_alone(embedding)
    assert not left_alone(linear)

    class Custom(nn.Linear):
        pass

    model = peft_model(nn.Sequential(Custom(K, N)), target_modules=["0"])
    layer = model.base_model.model[0]
    assert "base layer class" in left_alone(layer)
    assert "Custom" in left_alone(layer)
    with pytest.raises(ValueError, match="base layer class"):
        adopt(layer)
    assert type(layer) is PeftLinear

    layer = peft_model().base_model.model.up
    layer.forward = lambda x: x
    assert "replaced on the instance" in left_alone(layer)
    assert "torch.nn.modules.linear.Linear" in left_alone(nn.Linear(2, 2))


def test_a_layer_nested_in_another_tuner_is_left_alone():
    torch.manual_seed(0)
    model = peft.get_peft_model(Mlp(), peft.LoHaConfig(r=2, target_modules=["up"], init_weights=False), mixed=True)
    loha = model.base_model.model.up
    config = peft.LoraConfig(r=2, init_lora_weights=False)
    layer = PeftLinear(loha, "default", config=config, r=2, lora_alpha=4)
    assert "nested in another PEFT layer" in left_alone(layer)
    assert "nested in another PEFT layer" in predicted(layer)


# Merging.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge_give_the_same_bits(dtype):
    model = peft_model(Mlp(dtype=dtype), lora_bias=True)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    fused = patched_copy(model)
    for layer in fused_layers(fused):
        nn.init.normal_(layer.lora_B["default"].bias)
    before = {name: value.clone() for name, value in fused.state_dict().items()}

    def is_as_before():
        return all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())

    fused.merge_adapter()
    assert not is_as_before()
    layer = fused.base_model.model.up
    wide = before["base_model.model.up.base_layer.weight"].double()
    wide += layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    rounding = torch.finfo(dtype).eps / 2 * wide.abs() + (1e-6 if dtype == torch.float32 else 1e-7)
    assert ((layer.weight.double() - wide).abs() <= rounding * 1.01).all()
    with pytest.warns(UserWarning, match="additionally merging"):
        fused.merge_adapter(["second"])
    assert layer.merged_adapters == ["default", "second"]
    fused.unmerge_adapter()
    assert is_as_before()
    fused.merge_adapter(["second", "default"])
    fused.unmerge_adapter()
    assert is_as_before()
    with pytest.warns(UserWarning, match="Already unmerged"):
        fused.unmerge_adapter()
    fused = copy.deepcopy(fused)
    fused.merge_adapter()
    fused = copy.deepcopy(fused)
    fused.unmerge_adapter()
    assert is_as_before()


def test_merge_onto_what_peft_merged_before():
    model = peft_model(Mlp(dtype=torch.bfloat16))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    model.merge_adapter(["default"])
    merged_by_peft = {name: value.clone() for name, value in model.state_dict().items()}
    fused = patched_copy(model)
    with pytest.warns(UserWarning, match="additionally merging"):
        fused.merge_adapter(["second"])
    fastlora.unpatch(fused)
    assert fused.base_model.model.up.merged_adapters == ["default", "second"]
    fused = patched_copy(model)
    model.unmerge_adapter()
    fused.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, fused.state_dict()[name]), name
    assert merged_by_peft.keys() == fused.state_dict().keys()


def test_weights_loaded_while_merged_are_not_overwritten():
    fused = patched_copy(peft_model())
    layer = fused.base_model.model.up
    fused.merge_adapter()
    new = torch.randn(N, K)
    layer.weight.data.copy_(new)
    fused.unmerge_adapter()
    assert torch.allclose(layer.weight, new - layer.get_delta_weight("default"), atol=1e-6)


def test_dtype_changed_while_merged():
    fused = patched_copy(peft_model())
    before = fused.base_model.model.up.weight.clone()
    fused.merge_adapter()
    fused.bfloat16()
    fused.unmerge_adapter()
    assert torch.equal(fused.base_model.model.up.weight, before.bfloat16())


def test_merge_and_unload():
    model = peft_model()
    fused = patched_copy(model)
    x = torch.randn(5, K)
    want = model(x)
    plain = fused.merge_and_unload()
    assert type(plain.up) is nn.Linear
    assert torch.allclose(plain(x), want, atol=1e-6)


# The parts that other code relies on.
def test_compiled_without_graph_breaks():
    fused = patched_copy(peft_model(lora_dropout=0.0))
    x = torch.randn(5, K)
    want = run(fused, x)
    compiled = torch.compile(fused.base_model.model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.allclose(y, want[0], atol=1e-6)
    before = counts(fused)
    compiled(x)
    assert counts(fused) == before


def test_backend_is_passed_on():
    layer = adopt(peft_model().base_model.model.up, backend="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        layer(torch.randn(2, K))
