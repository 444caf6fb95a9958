# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# Attributes of modules are typed as tensors or modules; these tests know which they made.
"""Groups in a patched model: the same numbers as one by one, whatever a model does with its layers."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from grouped_models import Attention, Block, Groups, K, at_every_size, counted_rounds, itself, randn, step, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FusedLoraLinear
from fastlora.layers import group as grouping
from fastlora.layers.group import dissolve_groups, watching
from fastlora.ops.group import group as group_op

every_size = pytest.fixture(autouse=True)(at_every_size)
shrinks = pytest.fixture(counted_rounds)


def make(module_class=Attention, group="auto", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = module_class().to(dtype)
    fastlora.patch(model, r=4, init_lora_weights=False, group=group, **settings)
    return model


def test_groups_by_name_and_the_report():
    torch.manual_seed(0)
    report = fastlora.patch(Block(), r=4, group="auto")
    assert report.groups == [("gate_proj", "up_proj"), ("attn.q_proj", "attn.k_proj", "attn.v_proj")]
    assert "2 groups" in str(report)
    assert fastlora.patch(Block(), r=4).groups == []
    assert fastlora.patch(Attention(), group=[("k_proj", "v_proj")]).groups == [("k_proj", "v_proj")]
    assert fastlora.patch(Attention(), target_modules=["q_proj"], group="auto").groups == []


def test_patching_again_leaves_groups_and_group_can_come_later():
    model = make(group=None)
    assert fastlora.patch(model, r=4, group="auto").groups == [("q_proj", "k_proj", "v_proj")]
    seat = model.q_proj.group
    assert fastlora.patch(model, r=4, group="auto").groups == [] and model.q_proj.group is seat
    fastlora.patch(model, r=2, adapter_name="second")
    assert model.q_proj.group is seat


@pytest.mark.parametrize("group", ["q_proj", 3, [("q", 1)], ["q_proj"]])
def test_wrong_group(group):
    model = Attention()
    with pytest.raises(ValueError, match="patch: group: got"):
        fastlora.patch(model, group=group)
    assert not fastlora.is_patched(model)


def test_cross_attention_by_its_name_groups_only_k_and_v():
    model = nn.ModuleDict({"self_attn": Attention(), "encoder_attn": Attention()})
    groups = fastlora.patch(model, group="auto").groups
    assert groups == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ]


class TestPlain(Groups):
    def pair(self, module_class=Attention, dtype=torch.float64, dropout=0.0):
        settings = {"dtype": dtype, "lora_dropout": dropout}
        return make(module_class, group=None, **settings), make(module_class, **settings)

    def undrop(self, layer):
        layer.lora_dropout["default"] = 0.0

    @pytest.mark.parametrize("state", ["merged", "disabled", "two adapters", "LoRA-GA's start", "eval"])
    def test_states_of_the_whole_model(self, state, shrinks):
        pair = self.pair(dropout=0.5 if state == "eval" else 0.0)
        with contextlib.ExitStack() as stack:
            for model in pair:
                if state == "merged":
                    fastlora.merge(model)
                elif state == "disabled":
                    stack.enter_context(fastlora.disable_adapter(model))
                elif state == "two adapters":
                    torch.manual_seed(1)
                    fastlora.patch(model, r=2, adapter_name="b", init_lora_weights=False)
                    fastlora.set_adapter(model, ["default", "b"])
                elif state == "LoRA-GA's start":
                    model.k_proj.set_initial_factors("default", randn(4, K), randn(8, 4))
                else:
                    model.eval()
            self.check(pair, itself, [] if state in ("merged", "disabled") else [3], shrinks)

    def test_hooks_on_members(self, shrinks):
        pair, seen = self.pair(), []
        for model in pair:
            model.k_proj.register_forward_hook(lambda module, args, y: seen.append("forward") or y * 2)
        self.check(pair, itself, [3], shrinks)
        for model in pair:
            model.k_proj.register_forward_pre_hook(lambda module, args: (seen.append("pre"), args[0] * 3)[1])
        # k is not foreseen any more, and what it gets is not x: q and v share a round, k and v another
        self.check(pair, itself, [2, 3, 2], shrinks)
        for model in pair:
            model.v_proj.register_full_backward_hook(lambda module, grads, _: seen.append("backward"))
        torch.testing.assert_close(*map(step, pair))
        assert {"forward", "pre", "backward"} <= set(seen)


def _change_weights(model):
    with torch.no_grad():
        model.k_proj.lora_A["default"].mul_(2)


def _data_swapped(model):
    model.k_proj.lora_A["default"].data = model.k_proj.lora_A["default"].data * 2


CHANGES = {
    "lora_A": _change_weights,
    "lora_A.data": _data_swapped,
    "lora_B": lambda model: model.k_proj.lora_B["default"].data.mul_(2),
    "weight": lambda model: model.k_proj.weight.data.mul_(2),
    "scaling": lambda model: model.k_proj.scaling.update(default=7.0),
    "merged": lambda model: model.k_proj.merge(),
    "disabled": lambda model: setattr(model.k_proj, "disable_adapters", True),
    "frozen": lambda model: model.k_proj.lora_A["default"].requires_grad_(False),
    "a second adapter": lambda model: (model.k_proj.add_adapter("b", r=2), model.k_proj.set_adapter(["default", "b"])),
    "ungrouped": lambda model: setattr(model.k_proj, "group", None),
    "unpatched": lambda model: fastlora.unpatch(model.k_proj),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_changed_between_two_members_calls(name):
    model, alone = make(), make(group=None)
    results = []
    for one in (model, alone):
        x = randn(7, K).requires_grad_()
        q = one.q_proj(x)
        torch.manual_seed(0)
        CHANGES[name](one)
        y = torch.cat((q, one.k_proj(x), one.v_proj(x)), -1)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained(one)], allow_unused=True)])
    torch.testing.assert_close(*results)


def test_two_forward_passes_before_the_backward_passes_of_checkpoints():
    model, alone = make(Block), make(Block, group=None)

    def run(model):
        return lambda x: checkpoint(model, x, use_reentrant=False) + checkpoint(model, x + 1, use_reentrant=False)

    torch.testing.assert_close(step(model, run(model)), step(alone, run(alone)))


def test_a_replaced_forward_is_not_foreseen(shrinks):
    model = make()
    original = model.k_proj.forward
    model.k_proj.forward = lambda x: original(x) + 1
    step(model)
    assert shrinks[0] == 2


def test_deepcopy_and_pickle_group_their_own_layers(shrinks):
    model = make()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        group, other = twin.q_proj.group[0], model.q_proj.group[0]
        assert group is twin.k_proj.group[0] is not other
        assert [id(layer) for layer in group.layers()] == [id(m) for m in (twin.q_proj, twin.k_proj, twin.v_proj)]
        shrinks.clear()
        torch.testing.assert_close(step(twin), step(model))
        assert shrinks == [3, 3]
    lone = copy.deepcopy(model.q_proj)
    assert [id(layer) for layer in lone.group[0].layers()] == [id(lone)]
    shrinks.clear()
    lone(randn(3, K))
    copy.copy(model.q_proj)(randn(3, K))
    assert shrinks == []
    assert len(pickle.dumps(model.v_proj)) < len(pickle.dumps(model)) / 2


def test_unpatch_is_exact():
    model = Attention()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    fastlora.patch(model, group="auto")
    fastlora.unpatch(model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    assert type(model.q_proj) is nn.Linear


def test_nothing_is_kept_after_the_pass():
    model = make()
    for skipped in (False, True):
        x = randn(3, K).requires_grad_()
        hidden = x * 1
        alive = weakref.ref(hidden)
        y = model.q_proj(hidden) if skipped else model(hidden)
        del hidden
        y.sum().backward()
        del y
        gc.collect()
        assert alive() is None


def test_a_skipped_members_round_ends_with_the_next_group():
    model = make(Block)
    hidden = randn(3, K)
    alive = weakref.ref(hidden)
    model.attn.q_proj(hidden)
    del hidden
    h = randn(3, K)
    model.gate_proj(h)
    model.up_proj(h)
    assert alive() is None and grouping._here.round is None


def test_an_error_in_a_member_ends_the_round(monkeypatch):
    model, x = make(), randn(3, K)
    model.q_proj(x)

    def broken(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(group_op.SharedInput, "call", broken)
        with pytest.raises(MemoryError):
            model.k_proj(x)
    torch.testing.assert_close(model.k_proj(x), make(group=None).k_proj(x))


def test_threads_do_not_share_rounds():
    model, alone, x = make(), make(group=None), randn(3, K)
    model.q_proj(x)
    results = []
    thread = threading.Thread(target=lambda: results.append(model.k_proj(x)))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], alone.k_proj(x))
    torch.testing.assert_close(model.k_proj(x), alone.k_proj(x))


def test_watching_finds_what_is_fed_the_same_tensor(shrinks):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(K, 8), nn.Linear(K, 8), nn.Linear(K, 8)

        def forward(self, x):
            return torch.cat((self.a(torch.tanh(x)), self.c(x), self.b(x)), -1)

    torch.manual_seed(0)
    model = Odd().double()
    fastlora.patch(model, r=4, init_lora_weights=False, group=[("a", "b")])
    with watching(model) as groups, torch.no_grad():
        model(randn(3, K))
    assert groups == [("c", "b")]
    assert model.a.group is None and not model.a._forward_pre_hooks
    alone = copy.deepcopy(model)
    dissolve_groups(alone)
    want = step(alone)
    shrinks.clear()
    torch.testing.assert_close(step(model), want)
    assert shrinks == [2]


def test_the_function_that_calls_the_members():
    frames = []

    class Probe(FusedLoraLinear):
        def forward(self, input):
            raise AssertionError

    # As if it were layers/group.py's: what belongs to fastlora is passed over.
    Probe.forward = eval("lambda self, input: record(_caller()) or input", vars(grouping) | {"record": frames.append})
    probe, x = Probe(K, K, r=4), randn(3, K)

    def through(x):
        return probe(x)

    probe(x)
    probe.register_forward_hook(lambda module, args, y: None)
    probe(x)
    through(x)
    assert frames[0] == frames[1] != frames[2]
