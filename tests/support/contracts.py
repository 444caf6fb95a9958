# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false
"""What every op promises, once, for wherever it runs: ATen on a CPU, the Triton kernels interpreted, a GPU.

A test module names the places and the sizes, and adds what is true of one place only:

    class TestGroup(contracts.Group):
        places = contracts.INTERPRETED

Dropout probabilities here are multiples of 1/65536, which the kernels round them to.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64, assert_surroundings_untouched, poisoned_empty, with_layout
from problems import path
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastlora.functional import (
    Adapter,
    GroupLayer,
    Routing,
    dora_linear,
    lora_group,
    lora_grouped_linear,
    lora_linear,
    lora_mixed_batch,
    lora_mlp,
)
from fastlora.kernels.importance_plan import Averages, Factors, Layout
from fastlora.kernels.segment_plan import BASE, Segments
from fastlora.ops import reference
from fastlora.ops.dora import dora as dora_op
from fastlora.ops.experts import experts as experts_op
from fastlora.ops.group import group as group_op
from fastlora.ops.importance import aten as importance_aten
from fastlora.ops.importance import importance as importance_op
from fastlora.ops.lora import choice
from fastlora.ops.mixed import mixed as mixed_op
from fastlora.ops.mlp import mlp as mlp_op
from fastlora.ops.quant import weights as quant_weights

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SCALING = 1.5
# Of x, A, B and dY: what a start near zero, a loss that is a mean over many tokens, or a large one make.
MAGNITUDES = {
    "usual": (1.0, 1.0, 1.0, 1.0),
    "tiny": (1.0, 1.0, 1e-5, 1e-5),
    "tiny everywhere": (1e-3, 1e-4, 1e-4, 1e-4),
    "huge": (30.0, 1e3, 1e-3, 40.0),
    "mixed": (30.0, 1e-4, 10.0, 1e-5),
}
Dtypes = tuple[torch.dtype, torch.dtype]  # of x and the base weights; of the adapters
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    device: str
    backend: str
    path: str = "function"  # or "composed": ATen's own autograd, which small calls on a CPU take

    def __str__(self) -> str:
        return self.backend if self.path == "function" else self.path

    def keep_mask(self, rows: Tensor, p: float) -> Tensor:
        """What the next dropout of `rows` keeps, drawn from torch's generator as the place draws it."""
        if self.backend == "torch":
            return F.dropout(torch.ones_like(rows), p) != 0
        dropout = importlib.import_module("fastlora.kernels.dropout")  # Triton exists on Linux only
        return dropout.reference_keep_mask(dropout.new_seed(rows.device), *rows.shape, p)


ATEN = [Place("cpu", "torch"), Place("cpu", "torch", "composed")]
INTERPRETED = [Place("cpu", "cublas"), Place("cpu", "triton")]
ON_A_GPU = [Place("cuda", "cublas"), Place("cuda", "triton")]
ATEN_ON_A_GPU = [Place("cuda", "torch")]  # without dropout: its masks there are torch's own affair


@dataclass(frozen=True)
class Case:
    """`tensors`: x, the frozen ones, the adapters' (with a number or name after the dot), and dy.0, dy.1, ... for the
    outputs; `ps`: a dropout probability for each adapter; `size`: what `make` was called with."""

    tensors: Tensors
    ps: tuple[float, ...]
    size: Mapping[str, Any]

    @property
    def trained(self) -> list[str]:
        return [name for name in self.tensors if name.split(".")[0] in ("x", "A", "B", "m", "combine")]


class Contract:
    places: ClassVar[Sequence[Place]] = ATEN
    one_product: ClassVar[bool] = True  # S and dS are made of x and dY themselves, not of what was rounded between
    dtypes_with_dropout: ClassVar[Sequence[Dtypes]] = ()  # (): as without
    dtypes: ClassVar[Sequence[Dtypes]] = ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16))
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    shapes: ClassVar[Sequence[tuple[int, ...]]] = ((0,), (1,), (), (2, 3, 4), (2, 0, 5))  # of x, but for K
    self_checks: ClassVar[Sequence[tuple[Dtypes, bool]]] = ()  # (dtypes, dropout); (): those of the values
    ranks: ClassVar[Sequence[int]] = (1, 2, 7, 16, 64, 512)
    magnitudes: ClassVar[Mapping[str, tuple[float, ...]]] = MAGNITUDES
    ps: ClassVar[Sequence[float]] = (0.0,)  # with which these are tried
    modules: ClassVar[str]  # of the implementations aten and triton
    runs: ClassVar[str] = "forward"  # the implementation's function that shows that it ran
    checked: ClassVar[tuple[str, ...]] = ("forward", "backward")  # what the self-check runs of it

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        places = INTERPRETED[1:] if metafunc.function.__name__.endswith("_by_triton") else self.places
        if {"checked", "function"} & set(metafunc.fixturenames):  # once for each implementation
            places = list({self.implementation(place): place for place in reversed(places)}.values())
        for name, values in (("place", places), ("size", self.sizes), ("dtypes", self.dtypes)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=_name)
        with_dropout = () if self.places == ATEN_ON_A_GPU else self.dtypes_with_dropout or self.dtypes
        variants = [(one, False) for one in self.dtypes] + [(one, True) for one in with_dropout]
        for name, values in (("variant", variants), ("checked", self.self_checks or variants)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=lambda v: _name(v[0]) + " dropped" * v[1])
        own = {"shape": self.shapes, "function": self.checked, "r": self.ranks}
        for name, values in (own | {"magnitudes": self.magnitudes, "dropped": self.ps}).items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=str)

    @pytest.fixture(autouse=True)
    def _at_every_size(self, place):
        with path(place.path):
            yield
        choice.reset()

    # What an op says of itself.
    def case(self, draw: Callable[..., Tensor], p: float, **size: Any) -> Case:
        raise NotImplementedError

    def op(self, of: Tensors, case: Case, **options: Any) -> Sequence[Tensor]:
        raise NotImplementedError

    def specification(self, of: Tensors, case: Case, keeps: Sequence[Tensor | None]) -> Sequence[Tensor]:
        raise NotImplementedError

    def masks(self, case: Case, place: Place) -> list[Tensor | None]:
        """What dropout keeps for each adapter, in the order in which the op draws."""
        x = case.tensors["x"]
        keeps = [place.keep_mask(x.reshape(-1, x.shape[-1]), p) if p else None for p in case.ps]
        return [None if keep is None else keep.view(x.shape) for keep in keeps]

    def self_check(self, module: ModuleType, device: torch.device, dtypes: Dtypes, dropout: bool) -> str | None:
        raise NotImplementedError

    def implementation(self, place: Place) -> ModuleType:
        return importlib.import_module(f"{self.modules}.{'aten' if place.backend == 'torch' else 'triton'}")

    # What is made of that.
    def make(self, place: Place, dtypes: Dtypes = (FP32, FP32), p: float = 0.0, **size: Any) -> Case:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0, adapter: bool = False) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=FP64) * scale
            return values.to(dtypes[adapter]).to(place.device)

        first = next(iter(self.sizes.values()))
        return self.case(draw, p, **{**first, **size})

    def outcome(self, run: Callable[[Tensors], Sequence[Tensor]], of: Tensors, trained: Sequence[str]) -> Tensors:
        """The outputs, and the gradient of each trained tensor, by name."""
        leaves = {name: t.detach().requires_grad_(name in trained) for name, t in of.items()}
        ys = run(leaves)
        dys = [leaves[f"dy.{i}"] for i in range(len(ys))]
        grads = torch.autograd.grad(ys, [leaves[name] for name in trained], dys) if trained else ()
        return {**{f"y.{i}": y.detach() for i, y in enumerate(ys)}, **dict(zip(trained, grads, strict=True))}

    def run(self, case: Case, place: Place, trained: Sequence[str] | None = None) -> Tensors:
        torch.manual_seed(7)
        wanted = case.trained if trained is None else trained
        return self.outcome(lambda of: self.op(of, case, backend=place.backend), case.tensors, wanted)

    def check(self, case: Case, place: Place, trained: Sequence[str] | None = None, by_rule: bool = False) -> Tensors:
        """Outputs and gradients are fp64's: by the rule of numerics.py or, where positions are in question rather than
        roundings, a float32 problem's to 4e-6 in norm. Kernels with adapters wider than x: dA and dB to 1e-5."""
        trained = case.trained if trained is None else trained
        got = self.run(case, place, trained)
        torch.manual_seed(7)
        keeps = self.masks(case, place)

        def wanted(of: Tensors) -> Tensors:
            return self.outcome(lambda leaves: self.specification(leaves, case, keeps), of, trained)

        of, x = case.tensors, case.tensors["x"]
        exact = wanted({name: t.double() for name, t in of.items()})
        wider = any(of[name].dtype.itemsize > x.dtype.itemsize for name in case.trained)
        wide = place.backend != "torch" and wider
        if wide and not self.one_product:
            of = {name: t.to(x.dtype) for name, t in of.items()}
        near = wanted(of) if by_rule else exact
        for name, value in got.items():
            if by_rule and wide and self.one_product and name[0] in "AB":
                assert (value.double() - exact[name]).norm() <= 1e-5 * exact[name].norm(), name
            elif by_rule:
                assert_close_to_fp64(value, exact[name], near[name].to(value.dtype), name)
                if wider and not wide:
                    # Sums that cancel may round to nothing in half precision; what is beyond eager's error may not.
                    least = (near[name].double() - exact[name]).abs().amax() if value.numel() else 0.0
                    zeros = (value == 0) & (near[name] != 0) & (exact[name].abs() > least)
                    assert not zeros.any(), f"{name}: {zeros.sum().item()} zeros where eager PyTorch has none"
            else:
                assert value.shape == exact[name].shape, name
                error, size = (value.double() - exact[name]), exact[name]
                assert error.norm() <= 4e-6 * size.norm(), f"{name}: {error.norm() / size.norm():.1e}"
                assert not error.numel() or error.abs().max() <= 1e-5 * size.abs().max(), name
        return got

    def spied(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        calls: list[int] = []
        for module in self.implementations(place):
            original = getattr(module, self.runs)
            counting = functools.partial(lambda run, *a, **k: calls.append(1) or run(*a, **k), original)
            monkeypatch.setattr(module, self.runs, counting)
        return calls

    def implementations(self, place: Place) -> list[Any]:
        return [self.implementation(place)]

    # The promises.
    def test_outputs_and_every_gradient(self, place, size, variant, monkeypatch):
        dtypes, dropout = variant
        calls = self.spied(place, monkeypatch)
        case = self.make(place, dtypes, 0.5 if dropout else 0.0, **self.sizes[size])
        # One row's few float32 numbers are no sample for a rule about the largest error among them.
        got = self.check(case, place, by_rule=size != "row" or {t.dtype for t in case.tensors.values()} != {FP32})
        assert calls or place.path == "composed", "another implementation ran"
        assert all(value.dtype == case.tensors[name.replace("y.", "dy.")].dtype for name, value in got.items())

    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_wide_adapters_of_every_magnitude(self, place, magnitudes, dtype, dropped):
        """Nothing underflows or overflows on the low-rank path that would not in float32."""
        case, factors = self.make(place, (dtype, FP32), dropped), dict(zip("xABd", self.magnitudes[magnitudes]))
        scaled = {name: (t.double() * factors.get(name[0], 1.0)).to(t.dtype) for name, t in case.tensors.items()}
        self.check(replace(case, tensors=scaled), place, by_rule=True)

    @pytest.mark.parametrize("kinds", ["x", "A", "B", "weight bias", "x bias", ""])
    def test_only_what_is_needed(self, place, kinds):
        case = self.make(place)
        trained = [name for name in case.tensors if name.split(".")[0] in kinds.split()]
        got = self.check(case, place, trained)
        assert list(got) == [name.removeprefix("d") for name in case.tensors if name.startswith("dy")] + trained

    @pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
    def test_strides(self, place, layout):
        """Any of the tensors may be a view; around it lies NaN, so that a stray read shows."""
        case = self.make(place, p=0.0 if place in ATEN_ON_A_GPU else 0.5)
        viewed = {
            name: t if t.dim() == 1 else with_layout(t.reshape(-1, t.shape[-1]), layout).unflatten(0, t.shape[:-1])
            for name, t in case.tensors.items()
        }
        self.check(replace(case, tensors=viewed), place)

    def test_inputs_of_every_shape(self, place, shape):
        case = self.make(place, shape=shape)
        got = self.check(case, place)
        assert got["y.0"].shape[:-1] == shape and got["x"].shape == case.tensors["x"].shape

    def test_the_same_bits(self, place):
        """On every run, without gradients, and when the forward pass runs again for the backward pass."""
        case = self.make(place, (BF16, FP32), 0.5)
        want, again = self.run(case, place), self.run(case, place)
        for context in (torch.no_grad, torch.inference_mode):
            torch.manual_seed(7)
            with context():
                again |= {f"y.{i}": y for i, y in enumerate(self.op(case.tensors, case, backend=place.backend))}
            assert all(torch.equal(again[name], value) for name, value in want.items())
        for reentrant in (False, True):
            torch.manual_seed(7)

            def recomputed(of: Tensors, reentrant: bool = reentrant) -> Sequence[Tensor]:
                run = lambda x: tuple(self.op({**of, "x": x}, case, backend=place.backend))  # noqa: E731
                return checkpoint(run, of["x"], use_reentrant=reentrant)

            leaves = {n: t.detach().requires_grad_(n in case.trained) for n, t in case.tensors.items()}
            ys = recomputed(leaves)
            torch.autograd.backward(ys, [case.tensors[f"dy.{i}"] for i in range(len(ys))])
            assert all(torch.equal(leaves[name].grad, want[name]) for name in case.trained)

    def test_nothing_given_or_saved_is_written_to(self, place):
        case = self.make(place, p=0.5)
        leaves = {n: t.detach().requires_grad_(n in case.trained) for n, t in case.tensors.items()}
        saved: list[tuple[Tensor, Tensor]] = [(t, t.detach().clone()) for t in leaves.values()]

        def pack(tensor: Tensor) -> Tensor:
            saved.append((tensor, tensor.detach().clone()))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            ys = self.op(leaves, case, backend=place.backend)
        inputs, dys = [leaves[name] for name in case.trained], [leaves[f"dy.{i}"] for i in range(len(ys))]
        first = torch.autograd.grad(ys, inputs, dys, retain_graph=True)
        assert all(torch.equal(tensor, copied) for tensor, copied in saved)
        assert all(map(torch.equal, first, torch.autograd.grad(ys, inputs, dys)))

    def test_differentiating_twice_raises(self, place):
        if place.path == "composed":
            pytest.skip("ATen's own autograd differentiates as often as one likes")
        case = self.make(place)
        x = case.tensors["x"].detach().requires_grad_()
        ys = self.op({**case.tensors, "x": x}, case, backend=place.backend)
        (dx,) = torch.autograd.grad(sum(y.square().sum() for y in ys), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
            dx.sum().backward()

    def test_passes_its_self_check(self, place, checked):
        dtypes, dropout = checked
        before = torch.get_rng_state()
        assert self.self_check(self.implementation(place), torch.device(place.device), dtypes, dropout) is None
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_self_check_sees_a_wrong_result(self, place, function, monkeypatch):
        module = self.implementation(place)
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, **k: _spoiled(original(*a, **k)))
        assert "differ" in str(self.self_check(module, torch.device(place.device), (FP32, FP32), False))


class Interpreted:
    """Goes before a contract: what Triton's interpreter, thousands of times slower than a GPU, has time for."""

    places = INTERPRETED[:1]
    dtypes = ((BF16, FP32), (FP32, FP32))
    shapes = ((0,), (1,), (2, 3, 4))
    self_checks = (((BF16, FP32), True),)
    ranks = (1, 33)
    magnitudes: ClassVar = {}  # each kernel's: tests/interpreter/test_wide_adapters.py

    def test_the_last_product_by_triton(self, place):
        """The same kernels but for it, so once is enough."""
        self.check(self.make(place, self.dtypes[0], 0.5), place, by_rule=True)  # type: ignore[attr-defined]


def _name(value: Any) -> str:
    """Of a parameter: bfloat16-float32, cublas, "odd"."""
    names = value if isinstance(value, tuple) else (value,)
    return "-".join(str(name).removeprefix("torch.") for name in names)


def _spoiled(result: Any) -> Any:
    """The same with its first tensor, at whatever depth, a tenth larger."""
    if isinstance(result, Tensor):
        return result * 1.1
    first, *rest = result
    return type(result)((_spoiled(first), *rest))


class LoraLinear(Contract):
    modules = "fastlora.ops.lora"
    ps = (0.0, 0.25)
    sizes: ClassVar = {
        "odd": {"shape": (37,), "n": 53, "k": 45, "r": 5},
        "row": {"shape": (1,), "n": 33, "k": 40, "r": 16},
        "wide": {"shape": (20,), "n": 90, "k": 17, "r": 60},
    }

    def implementation(self, place):
        return choice.load(place.backend)

    def implementations(self, place):
        """`triton` has two forms: S inside the product, or made before it."""
        forms = ["triton", "triton_s_inside"] if place.backend == "triton" else [place.backend]
        return [choice.load(form) for form in forms]

    def case(self, draw, p, *, shape, n, k, r, bias=True, scaling=SCALING):
        of = {"x": draw(*shape, k), "weight": draw(n, k, scale=k**-0.5)} | ({"bias": draw(n)} if bias else {})
        of |= {"A": draw(r, k, scale=k**-0.5, adapter=True), "B": draw(n, r, scale=r**-0.5, adapter=True)}
        return Case(of | {"dy.0": draw(*shape, n)}, (p,), {"scaling": scaling})

    def op(self, of, case, **options):
        bias, scaling = of.get("bias"), case.size["scaling"]
        return [lora_linear(of["x"], of["weight"], of["A"], of["B"], scaling, bias, *case.ps, **options)]

    def specification(self, of, case, keeps):
        bias, scaling = of.get("bias"), case.size["scaling"]
        return [reference.lora_linear(of["x"], of["weight"], of["A"], of["B"], scaling, bias, *case.ps, *keeps)]

    def self_check(self, module, device, dtypes, dropout):
        return choice.self_check(module, device, *dtypes, dropout)

    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_one_of_everything(self, place, p, dtypes):
        """In numbers that no dtype rounds."""
        case = self.make(place, dtypes, p, shape=(1,), n=1, k=1, r=1)
        case = replace(case, tensors={n: t.sign() * (0.5 + 0.5 * (n > "d")) for n, t in case.tensors.items()})
        got = self.run(case, place)
        torch.manual_seed(7)
        keeps = self.masks(case, place)
        want = self.outcome(lambda of: self.specification(of, case, keeps), case.tensors, case.trained)
        assert all(torch.equal(got[name], value) for name, value in want.items())

    @pytest.mark.parametrize("scaling", [0.0, -2.5, 1e-3, 300.0, 2])
    def test_scales(self, place, scaling):
        self.check(self.make(place, scaling=scaling), place)

    def test_ranks_without_a_bias(self, place, r):
        self.check(self.make(place, r=r, bias=False), place)

    def test_everything_dropped(self, place):
        case = self.make(place, p=1.0)
        got = self.run(case, place)
        torch.testing.assert_close(
            got["y.0"], F.linear(case.tensors["x"], case.tensors["weight"], case.tensors["bias"])
        )
        torch.testing.assert_close(got["x"], case.tensors["dy.0"] @ case.tensors["weight"])
        assert not got["A"].any() and not got["B"].any()


class Group(Contract):
    modules = "fastlora.ops.group"
    sizes: ClassVar = {
        "three": {"shape": (19,), "k": 33, "sizes": (24, 17, 17), "ranks": (5, 2, 8)},
        "alike": {"shape": (2, 9), "k": 40, "sizes": (8, 8), "ranks": (4, 4)},
    }

    def case(self, draw, p, *, shape, k, sizes, ranks):
        of = {"x": draw(*shape, k)}
        for i, (n, r) in enumerate(zip(sizes, ranks, strict=True)):
            of |= {f"weight.{i}": draw(n, k, scale=k**-0.5), f"bias.{i}": draw(n), f"dy.{i}": draw(*shape, n)}
            of[f"A.{i}"] = draw(r, k, scale=k**-0.5, adapter=True)
            of[f"B.{i}"] = draw(n, r, scale=r**-0.5, adapter=True)
        # One that drops nothing, and different masks.
        return Case(of, tuple(0.0 if i == 1 else p / (1 + (i > 1)) for i in range(len(sizes))), {})

    def members(self, of, case):
        return [
            GroupLayer(of[f"weight.{i}"], [Adapter(of[f"A.{i}"], of[f"B.{i}"], 0.5 + i, p)], of[f"bias.{i}"])
            for i, p in enumerate(case.ps)
        ]

    def op(self, of, case, **options):
        return lora_group(of["x"], self.members(of, case), **options)

    def specification(self, of, case, keeps):
        return [
            reference.lora_linear(of["x"], layer.weight, *layer.adapters[0][:3], layer.bias, p, keep)
            for layer, p, keep in zip(self.members(of, case), case.ps, keeps, strict=True)
        ]

    def self_check(self, module, device, dtypes, dropout):
        return group_op.self_check(module, device, *dtypes, dropout)


class MixedBatch(Contract):
    modules = "fastlora.ops.mixed"
    shapes = ((6, 1), (6,), (6, 2, 3))  # of six sequences
    sizes: ClassVar = {
        "bare rows": {"ids": (1, 0, BASE, 1, 2, 0), "shape": (6, 5), "k": 33, "n": 20, "ranks": (4, 7, 6)},
        "none bare": {"ids": (2, 0, 1, 0), "shape": (4, 9), "k": 40, "n": 33, "ranks": (4, 6, 3)},
        "long runs": {"ids": (1, 1, 0), "shape": (3, 70), "k": 24, "n": 18, "ranks": (3, 5)},
    }

    def case(self, draw, p, *, ids, shape, k, n, ranks):
        of = {"x": draw(*shape, k), "weight": draw(n, k, scale=k**-0.5), "bias": draw(n), "dy.0": draw(*shape, n)}
        for i, r in enumerate(ranks):
            of[f"A.{i}"] = draw(r, k, scale=k**-0.5, adapter=True)
            of[f"B.{i}"] = draw(n, r, scale=r**-0.5, adapter=True)
        ps = tuple(0.0 if i == 1 else p / (1 + (i > 1)) for i in range(len(ranks)))
        return Case(of, ps, {"ids": ids, "tokens": torch.Size(shape[1:]).numel()})

    def adapters(self, of, case):
        return [Adapter(of[f"A.{i}"], of[f"B.{i}"], 0.5 + i, p) for i, p in enumerate(case.ps)]

    def op(self, of, case, **options):
        return [
            lora_mixed_batch(of["x"], of["weight"], self.adapters(of, case), case.size["ids"], of["bias"], **options)
        ]

    def specification(self, of, case, keeps):
        segments, adapters = Segments(case.size["ids"], case.size["tokens"]), self.adapters(of, case)
        used = [adapters[i] for i in segments.adapters]
        return [reference.mixed_batch_lora_linear(of["x"], of["weight"], used, segments.sequences, of["bias"], keeps)]

    def masks(self, case, place):
        """ATen draws one for each segment, in its order; the kernels have one seed for all rows of the batch."""
        segments, x = Segments(case.size["ids"], case.size["tokens"]), case.tensors["x"]
        k, state, keeps = x.shape[-1], None, []
        for i, start, end in zip(segments.adapters, segments.starts, segments.starts[1:], strict=False):
            p = case.ps[i]
            if not p:
                keeps.append(None)
            elif place.backend == "torch":
                keeps.append(place.keep_mask(x.new_empty(end - start, k), p))
            else:
                dropout = importlib.import_module("fastlora.kernels.dropout")
                state = dropout.new_seed(x.device) if state is None else state
                keeps.append(dropout.reference_keep_mask(state, end, k, p)[start:])
        return keeps

    def self_check(self, module, device, dtypes, dropout):
        masked_by_a_seed = not module.__name__.endswith("aten")  # the self-check reads such masks
        return mixed_op.self_check(module, device, *dtypes, dropout and masked_by_a_seed)

    def test_bare_rows_are_the_frozen_layers_bits(self, place):
        case = self.make(place, **MixedBatch.sizes["bare rows"])
        of = case.tensors
        y, frozen = self.run(case, place)["y.0"], F.linear(of["x"], of["weight"], of["bias"])
        assert torch.equal(y[2], frozen[2]) and not torch.equal(y[0], frozen[0])
        nothing = [BASE] * 6
        assert torch.equal(
            lora_mixed_batch(of["x"], of["weight"], self.adapters(of, case), nothing, of["bias"]), frozen
        )


class Experts(Contract):
    """Four experts of which the third has no token, a token that another rank's expert takes, and two adapters."""

    modules = "fastlora.ops.experts"
    shapes = ((0,), (1,), (11,))
    sizes: ClassVar = {
        "gathered": {"tokens": 13, "top_k": 2, "n": 20, "k": 33, "ranks": (5, 2)},
        "transposed": {"tokens": 9, "top_k": 3, "n": 33, "k": 24, "ranks": (4,), "gathered": False, "transposed": True},
        "PEFT's strides": {"tokens": 40, "top_k": 1, "n": 18, "k": 16, "ranks": (8,), "strided": True, "combine": True},
        "combined": {"tokens": 12, "top_k": 3, "n": 18, "k": 19, "ranks": (3, 2), "gathered": False, "combine": True},
    }

    def case(self, draw, p, *, tokens, top_k, n, k, ranks, gathered=True, shape=None, **flags):
        tokens, top_k = (tokens, top_k) if shape is None else (*shape, 1)
        index = torch.randint(3, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
        index = index + index // 2  # none to the third
        index[-1:, -1:] = 4 if tokens > 1 else 3
        size, rows = {"index": index, "gathered": gathered, "is_transposed": "transposed" in flags}, tokens * top_k
        of = {"x": draw(tokens if gathered else rows, k), "bias": draw(4, n), "weight": draw(4, n, k, scale=k**-0.5)}
        of["weight"] = of["weight"].mT.contiguous() if "transposed" in flags else of["weight"]
        of |= {"combine": draw(tokens, top_k)} if "combine" in flags else {}
        of["dy.0"] = draw(tokens if "combine" in flags else rows, n)
        for i, r in enumerate(ranks):
            of[f"A.{i}"] = draw(4, r, k, scale=k**-0.5, adapter=True)
            of[f"B.{i}"] = draw(4, n, r, scale=r**-0.5, adapter=True)
            if "strided" in flags:
                of[f"B.{i}"] = of[f"B.{i}"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return Case(of, tuple(0.0 if i == 1 else p for i in range(len(ranks))), size)

    def factors(self, of, case):
        count = range(len(case.ps))
        return [of[f"A.{i}"] for i in count], [of[f"B.{i}"] for i in count], [0.5 + i for i in count]

    def op(self, of, case, **options):
        options |= {**case.size, "bias": of["bias"], "dropout_p": case.ps, "combine": of.get("combine")}
        routing = Routing(options.pop("index").to(of["x"].device), 4)
        return [lora_grouped_linear(of["x"], of["weight"], routing, *self.factors(of, case), **options)]

    def specification(self, of, case, keeps):
        routing = Routing(case.size["index"].to(of["x"].device), 4)
        rows = of["x"][routing.rows] if case.size["gathered"] else of["x"]
        weight = of["weight"].transpose(1, 2) if case.size["is_transposed"] else of["weight"]
        factors = (*self.factors(of, case), of["bias"])
        y = reference.grouped_lora_linear(rows, weight, routing.ends, *factors, case.ps, keeps)
        return [experts_op.aten.combined(y, of["combine"], routing.order) if "combine" in of else y]

    def masks(self, case, place):
        x, size = case.tensors["x"], (case.size["index"].numel(), case.tensors["x"].shape[1])
        seed = torch.randint(2**62, (1,), device=x.device) if any(case.ps) else None
        module = self.implementation(place)
        return [module.keep_mask(seed, i, *size, p) for i, p in enumerate(case.ps)]

    def self_check(self, module, device, dtypes, dropout):
        return experts_op.self_check(module, device, *dtypes, dropout, weighted=dropout)


class Mlp(Contract):
    modules = "fastlora.ops.mlp"
    # gate and up are half precision: with a large x their product overflows in eager PyTorch too
    magnitudes: ClassVar = {name: (min(of[0], 1.0), *of[1:]) for name, of in MAGNITUDES.items()}
    runs = "activate"
    one_product = False
    dtypes_with_dropout = ((FP32, FP32),)  # rounded elsewhere than in eager PyTorch, ReLU's input may change its sign
    checked = ("activate", "activate_backward")
    sizes: ClassVar = {
        f"{activation}{'' if gated else ', plain'}": {"activation": activation, "gated": gated}
        for activation in mlp_op.ACTIVATIONS
        for gated in (True, False)
    }
    EAGER: ClassVar = {
        "silu": lambda t: t * torch.sigmoid(t) if t.dtype == FP64 else F.silu(t),
        "gelu": lambda t: 0.5 * t * (1 + torch.erf(t / 2**0.5)) if t.dtype == FP64 else F.gelu(t),
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": lambda t: t.clamp_min(0.0),
    }

    def case(self, draw, p, *, activation, gated, shape=(3, 7), k=20, n=33, out=18, r=4):
        of, layers = {"x": draw(*shape, k), "dy.0": draw(*shape, out)}, {"gate": (n, k), "up": (n, k), "down": (out, n)}
        for name, (rows, columns) in layers.items():
            if name != "up" or gated:
                of |= {f"weight.{name}": draw(rows, columns, scale=columns**-0.5), f"bias.{name}": draw(rows)}
                of[f"A.{name}"] = draw(r, columns, scale=columns**-0.5, adapter=True)
                of[f"B.{name}"] = draw(rows, r, scale=r**-0.5, adapter=True)
        return Case(of, (p,) * (2 + gated), {"activation": activation, "n": n})

    def layer(self, of, case, name):
        if f"A.{name}" not in of:
            return None
        adapter = Adapter(of[f"A.{name}"], of[f"B.{name}"], SCALING, case.ps[0])
        return GroupLayer(of[f"weight.{name}"], [adapter], of[f"bias.{name}"])

    def op(self, of, case, **options):
        gate, up, down = (self.layer(of, case, name) for name in ("gate", "up", "down"))
        return [lora_mlp(of["x"], gate, up, down, case.size["activation"], **options)]

    def specification(self, of, case, keeps):
        def run(x, name, keep):
            layer = self.layer(of, case, name)
            return reference.lora_linear(x, layer.weight, *layer.adapters[0][:3], layer.bias, case.ps[0], keep)

        h = self.EAGER[case.size["activation"]](run(of["x"], "gate", keeps[0]))
        return [run(h * run(of["x"], "up", keeps[1]) if len(keeps) == 3 else h, "down", keeps[-1])]

    def masks(self, case, place):
        x, p, n = case.tensors["x"], case.ps[0], case.size["n"]
        rows = x.reshape(-1, x.shape[-1])
        inputs = [rows] * (len(case.ps) - 1) + [x.new_empty(len(rows), n)]
        return [place.keep_mask(one, p).view(*x.shape[:-1], one.shape[1]) if p else None for one in inputs]

    def self_check(self, module, device, dtypes, dropout):
        found = [mlp_op.self_check(module, device, *dtypes, dropout, name) for name in mlp_op.ACTIVATIONS]
        return next((one for one in found if one is not None), None)


class Dora(Contract):
    modules = "fastlora.ops.dora"
    runs = "scale_backward"
    checked = ("weight_norm", "scale", "scale_backward")
    sizes: ClassVar = {
        "odd": {"shape": (3, 11), "n": 47, "k": 33, "r": 5},
        "row": {"shape": (1,), "n": 33, "k": 40, "r": 16},
    }

    def case(self, draw, p, *, shape, n, k, r):
        of = {"x": draw(*shape, k), "weight": draw(n, k, scale=k**-0.5), "bias": draw(n), "dy.0": draw(*shape, n)}
        of |= {"A": draw(r, k, scale=k**-0.5, adapter=True), "B": draw(n, r, scale=r**-0.5, adapter=True)}
        return Case(of | {"m": draw(n, adapter=True).abs() + 0.5}, (p,), {})

    def op(self, of, case, **options):
        given = (of["x"], of["weight"], of["A"], of["B"], of["m"], SCALING, of["bias"], *case.ps)
        return [dora_linear(*given, **options)]

    def specification(self, of, case, keeps):
        given = (of["x"], of["weight"], of["A"], of["B"], of["m"], SCALING, of["bias"], *case.ps, *keeps)
        return [reference.dora_linear(*given)]

    def masks(self, case, place):
        """ATen's everywhere: dropout acts on W0's input too."""
        return super().masks(case, Place(place.device, "torch"))

    def self_check(self, module, device, dtypes, dropout):
        return dora_op.self_check(module, device, *dtypes)

    def test_a_magnitude_of_zero_still_learns(self, place):
        """Its gradient cannot come from the output, which does not depend on the row any more."""
        case = self.make(place)
        case.tensors["m"][:5] = 0.0
        assert self.check(case, place)["m"][:5].abs().min() > 1e-3

    def test_norms(self, place):
        """In fp32 whatever W0 is, also of a row that nearly cancels: eager PyTorch's in bf16 would be off by 2e-3."""
        module = self.implementation(place)
        for dtypes in self.dtypes:
            of = self.make(place, dtypes).tensors
            product = of["B"].double() @ of["A"].double()
            weights = [(of["weight"], 1e-6)]
            if dtypes == (FP32, FP32):
                weights.append(((-0.5 * product * (1 + 2.0**-10)).float(), 1e-3))
            for weight, tolerance in weights:
                norm = module.weight_norm(weight, of["A"], of["B"], 0.5)
                assert norm.dtype == FP32
                exact = (weight.double() + 0.5 * product).norm(dim=1)
                torch.testing.assert_close(norm.double(), exact, rtol=tolerance, atol=0)
            nothing = module.weight_norm((-0.5 * product).to(dtypes[0]), of["A"], of["B"], 0.5)
            assert not nothing.isnan().any()


class Importance:
    """AdaLoRA's averages and scores, three steps from zero and from anything else, against fp64."""

    device: ClassVar[str] = "cpu"
    implementation: ClassVar[ModuleType] = importance_aten
    dtypes: ClassVar[Sequence[torch.dtype]] = (FP32, BF16, FP16)
    sizes: ClassVar[Mapping[str, Sequence[tuple[int, int, int]]]] = {
        "mixed": [(5, 33, 7), (12, 20, 45), (1, 1, 1), (5, 33, 7)],
        "whole vectors": [(20, 50, 18), (4, 64, 12), (8, 300, 4)],
    }

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, values in (("dtype", self.dtypes), ("size", self.sizes)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=_name)

    def factors(self, layout: Layout, dtype: torch.dtype, seed: int) -> Factors:
        generator = torch.Generator().manual_seed(seed)

        def draw(factor: str) -> list[Tensor]:
            shapes = [layout.shape(factor, i) for i in range(len(layout.sizes))]
            return [torch.randn(shape, generator=generator).to(self.device, dtype) for shape in shapes]

        return Factors(*map(draw, Factors._fields))

    def steps(self, update: Callable, layout: Layout, dtype: torch.dtype, of: torch.dtype, without=()) -> list[Tensor]:
        """Sensitivity, uncertainty and scores; `without`: (factor, layer) of gradients that are None."""
        smooth, unsure = (torch.zeros(layout.numel, device=self.device, dtype=of) for _ in range(2))
        scores = smooth
        for step in range(3):
            weights, gradients = self.factors(layout, dtype, step), self.factors(layout, dtype, 100 + step)
            for factor, layer in without:
                getattr(gradients, factor)[layer] = None
            scores = update(Averages(layout, smooth, unsure, 0.85, 0.7), weights, gradients)
        return [smooth, unsure, scores]

    def test_three_steps(self, size, dtype):
        layout, without = Layout(self.sizes[size]), [("p", 0), ("q", len(self.sizes[size]) - 1)]
        runs = [self.steps(self.implementation.update, layout, dtype, FP32, without) for _ in range(2)]
        runs += [self.steps(importance_op.reference, layout, dtype, FP64, without)]
        runs += [self.steps(importance_aten.update, layout, dtype, FP32, without)]
        for what, got, again, exact, near in zip(("sensitivity", "uncertainty", "scores"), *runs, strict=True):
            assert torch.equal(got, again)
            assert_close_to_fp64(got, exact, near, what)

    def test_passes_its_self_check_which_sees_a_wrong_result(self, dtype, monkeypatch):
        device = torch.device(self.device)
        assert importance_op.self_check(self.implementation, device, dtype) is None
        assert importance_op.select(self.factors(Layout([(3, 5, 4)]), dtype, 0)) in (
            self.implementation,
            importance_aten,
        )
        original = self.implementation.update
        monkeypatch.setattr(self.implementation, "update", lambda *args: original(*args[:-1], None))
        assert "sensitivity differs" in str(importance_op.self_check(self.implementation, device, dtype))


class Nf4:
    """The four-bit kernel, bit for bit: code · maximum in fp32, and bitsandbytes where it is right."""

    device: ClassVar[str] = "cpu"
    shapes: ClassVar[Sequence[tuple[int, int]]] = (  # odd counts, a last block not full, more than 256 blocks
        (48, 192), (1, 1), (1, 2), (3, 43), (5, 130), (16, 96), (257, 66), (1, 64 * 300)
    )  # fmt: skip
    blocks: ClassVar[Sequence[int]] = (32, 128, 512, 4096)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, values in (("shape", self.shapes), ("block", self.blocks)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=str)

    def check(self, rows: int, columns: int, dtype: torch.dtype = BF16, block=64, nested=True, kind="nf4", config=None):
        from fastlora.kernels.nf4 import dequantise_4bit

        bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference")
        torch.manual_seed(rows + columns)
        weight = (torch.randn(rows, columns) * torch.rand(rows, 1)).to(self.device)
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=nested, quant_type=kind
        )
        state.dtype, n, absmax, inner = dtype, rows * columns, state.absmax, {}
        if nested:
            outer = state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
            absmax = state.state2.code[absmax.long()] * outer + state.offset
            inner = {"code2": state.state2.code, "absmax2": state.state2.absmax, "offset": state.offset}
        nibbles = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n]
        want = (state.code[nibbles.long()] * absmax.repeat_interleave(block)[:n]).to(dtype)
        # bitsandbytes 0.50.2's CPU kernel has some weights wrong whose rows are no whole number of blocks.
        if self.device == "cuda" or (columns % block == 0 and block < 2048):
            assert torch.equal(want.view(rows, columns), bnb.functional.dequantize_4bit(packed, state))
        out = poisoned_empty(1, n, dtype=dtype, device=self.device, layout="offset")
        dequantise_4bit(packed.reshape(-1), state.code, state.absmax, out, block, config=config, **inner)
        assert torch.equal(out.view(-1), want)
        assert_surroundings_untouched(out)

    def test_shapes(self, shape):
        self.check(*shape)

    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
    def test_dtypes(self, dtype, nested):
        self.check(*self.shapes[0], dtype, nested=nested)
        self.check(*self.shapes[1], dtype, nested=nested)

    @pytest.mark.parametrize("nested", [True, False])
    def test_block_sizes_and_fp4(self, block, nested):
        self.check(33, 250, FP32, block, nested)
        self.check(16, 128, kind="fp4")

    @pytest.mark.parametrize("dtype", [BF16, FP32])
    def test_the_check_before_first_use_passes(self, dtype):
        """Beside bitsandbytes' function."""
        assert quant_weights.compare_kernel(torch.device(self.device), dtype) is None
