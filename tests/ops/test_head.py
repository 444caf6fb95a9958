"""The head's loss with LoRA inside: against the reference in fp64, and what it holds in memory."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_fp64
from torch import Tensor

from bench.harness.memory import allocations_of
from fastlora.functional import lora_linear_cross_entropy, lora_linear_log_probs
from fastlora.ops import reference
from fastlora.ops.head import aten

SCALING = 1.5
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"z_loss": 0.01},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"num_items_in_batch": 40},
    {"label_smoothing": 0.2, "softcap": 2.0, "logit_scale": 2.0, "z_loss": 0.1, "reduction": "none"},
]


def problem(
    dtype: torch.dtype = torch.float64, adapter_dtype: torch.dtype | None = None, v: int = 101, t: int = 37, k: int = 24
) -> tuple[list[Tensor], Tensor]:
    """([h, weight, lora_A, lora_B, bias], labels), all leaves; some tokens do not count."""
    adapter_dtype = adapter_dtype or dtype
    h, bias = torch.randn(3, t, k).to(dtype), torch.randn(v).to(dtype)
    weight = (torch.randn(v, k) * k**-0.5).to(dtype)
    lora_A, lora_B = (torch.randn(4, k) * k**-0.5).to(adapter_dtype), torch.randn(v, 4).to(adapter_dtype)
    labels = torch.randint(v, (3, t))
    labels[0, :5] = -100
    return [leaf.requires_grad_() for leaf in (h, weight, lora_A, lora_B, bias)], labels


def written_out(leaves: Sequence[Any], labels: Tensor, keep: Tensor | None = None, **options: Any) -> Tensor:
    h, weight, lora_A, lora_B, bias = leaves
    p = 0.25 if keep is not None else 0.0
    head = (weight, bias, lora_A, lora_B, SCALING, p, options.get("logit_scale", 1.0), options.get("softcap", 0.0), 1.0)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    losses = reference.head_losses(h.flatten(0, -2), *head, labels.flatten(), -100, smoothing, z_loss, keep)
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return losses.view(labels.shape)
    divisor = options.get("num_items_in_batch", (labels != -100).sum() if reduction == "mean" else 1)
    return losses.sum() / divisor


def fused(leaves: Sequence[Any], labels: Tensor, **options: Any) -> Tensor:
    h, weight, lora_A, lora_B, bias = leaves
    return lora_linear_cross_entropy(h, weight, lora_A, lora_B, labels, SCALING, bias, **options)


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(aten, "CPU_CHUNK_BYTES", 101 * 4 * 20)  # 16 tokens of these problems, which divides nothing


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_reference_in_fp64(options):
    leaves, labels = problem()
    got, want = fused(leaves, labels, **options), written_out(leaves, labels, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    arriving = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad(loss, leaves, arriving) for loss in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    leaves, labels = problem(v=11, t=2, k=5)
    assert torch.autograd.gradcheck(lambda *ls: fused(list(ls), labels, softcap=4.0), leaves)
    h, weight, lora_A, lora_B, bias = leaves
    assert torch.autograd.gradcheck(
        lambda h, a, b: lora_linear_log_probs(h, weight, a, b, labels, SCALING, bias, temperature=0.7),
        (h, lora_A, lora_B),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3])
def test_no_more_than_twice_eagers_error(dtype, wide, magnitude):
    leaves, labels = problem(dtype, torch.float32 if wide else None)
    leaves[2].data *= magnitude
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = written_out(exact_leaves, labels)
    h, weight, lora_A, lora_B, bias = leaves
    s = F.linear(F.linear(h.to(lora_A.dtype), lora_A), lora_B)
    eager = F.cross_entropy((F.linear(h, weight, bias) + SCALING * s).float().flatten(0, 1), labels.flatten())
    got = fused(leaves, labels)
    assert_close_to_fp64(got.detach(), exact.detach(), eager.detach(), "loss")
    grads = [torch.autograd.grad(loss, of) for loss, of in ((got, leaves), (exact, exact_leaves), (eager, leaves))]
    for name, one, want, near in zip(("h", "weight", "lora_A", "lora_B", "bias"), *grads, strict=True):
        assert_close_to_fp64(one, want, near, name)


def test_a_loss_scale_arrives_before_half_precision_rounds():
    """A mean over many tokens has gradients below fp16's least number; with GradScaler's factor none is lost."""
    leaves, labels = problem(torch.float16, torch.float32, t=2000)
    leaves[1].data *= 1e-3
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (got,) = torch.autograd.grad(fused(leaves, labels) * 2.0**16, leaves[:1])
    (want,) = torch.autograd.grad(written_out(exact_leaves, labels) * 2.0**16, exact_leaves[:1])
    assert (got.double() - want).norm() <= 2e-3 * want.norm()


def test_a_frozen_head():
    (h, weight, _, _, bias), labels = problem()
    got = lora_linear_cross_entropy(h, weight.detach(), None, None, labels, 1.0, bias.detach())
    want = F.cross_entropy(F.linear(h, weight, bias).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, h)[0] for loss in (got, want)))


def test_dropout_is_that_of_eager_with_the_same_seed():
    leaves, labels = problem()
    torch.manual_seed(7)
    keep = torch.empty(leaves[0].flatten(0, 1).shape, dtype=torch.float64).bernoulli_(0.75)
    want = written_out(leaves, labels, keep)
    for reduction in ("mean", "none"):
        torch.manual_seed(7)
        got = fused(leaves, labels, dropout_p=0.25, reduction=reduction)
        got = got if reduction == "mean" else got.sum() / (labels != -100).sum()
        for one, other in zip(*(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, want))):
            torch.testing.assert_close(one, other)
    assert fused(leaves, labels, dropout_p=0.25, training=False) == fused(leaves, labels)


def test_log_probs_and_what_else_is_asked_of_a_token():
    (h, weight, lora_A, lora_B, bias), labels = problem()
    leaves = (h, weight, lora_A, lora_B, bias)
    z = reference.head_logits(h, weight, bias, lora_A, lora_B, SCALING, softcap=4.0, temperature=0.7)
    labels[1, :4] = z[1, :4].argmax(-1)
    counts = labels != -100
    options: dict[str, Any] = {"softcap": 4.0, "temperature": 0.7}
    flags = dict.fromkeys(("entropy", "top1", "mean_logits", "log_sum_sq_probs"), True)
    scores = lora_linear_log_probs(h, weight, lora_A, lora_B, labels, SCALING, bias, **options, **flags)
    log_probs = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counts
    entropy = torch.distributions.Categorical(logits=z).entropy() * counts
    torch.testing.assert_close(scores.log_probs, log_probs)
    torch.testing.assert_close(scores.entropy, entropy)
    assert torch.equal(scores.is_top1, (z.argmax(-1) == labels) & counts) and scores.is_top1[1, :4].all()
    torch.testing.assert_close(scores.mean_logits, z.mean(-1).detach() * counts)
    torch.testing.assert_close(scores.log_sum_sq_probs, z.softmax(-1).square().sum(-1).log().detach() * counts)
    assert not (scores.mean_logits.requires_grad or scores.log_sum_sq_probs.requires_grad)
    arriving = torch.randn(2, *labels.shape, dtype=torch.float64)
    for weights in (arriving, arriving * torch.tensor([0.0, 1.0])[:, None, None]):  # the entropy alone, too
        got, want = (
            torch.autograd.grad(
                [x for x, w in zip(pair, weights) if w.any()], leaves, [w for w in weights if w.any()], True
            )
            for pair in ((scores.log_probs, scores.entropy), (log_probs, entropy))
        )
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)
    plain = lora_linear_log_probs(h, weight, lora_A, lora_B, labels, SCALING, bias, **options)
    assert torch.equal(plain, scores.log_probs)


def test_without_a_token_that_counts():
    leaves, labels = problem()
    labels.fill_(-100)
    loss = fused(leaves, labels)
    assert loss.isnan()  # as F.cross_entropy's mean over nothing
    assert fused(leaves, labels, reduction="sum") == 0 and fused(leaves, labels, num_items_in_batch=8) == 0
    assert not fused(leaves, labels, reduction="none").any()
    grads = torch.autograd.grad(fused(leaves, labels, reduction="sum"), leaves)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0, 3), (5,), (2, 3, 4)])
def test_shapes(shape):
    (_, weight, lora_A, lora_B, bias), _ = problem()
    h, labels = torch.randn(*shape, 24, dtype=torch.float64, requires_grad=True), torch.randint(101, shape)
    got = lora_linear_cross_entropy(h, weight, lora_A, lora_B, labels, SCALING, bias, reduction="sum")
    want = written_out([h.reshape(-1, 24), weight, lora_A, lora_B, bias], labels.reshape(-1), reduction="sum")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, h)[0], torch.autograd.grad(want, h)[0])


def test_the_same_bits_on_every_run_and_nothing_saved_is_written_to():
    leaves, labels = problem(torch.float32)
    runs = []
    for _ in range(2):
        loss = fused(leaves, labels)
        runs.append([loss, *torch.autograd.grad(loss, leaves, retain_graph=True)])
        again = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(one, other) for one, other in zip(runs[-1][1:], again, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("trained", [("lora_A",), ("lora_B",), ("h",), ("weight", "bias"), ()])
def test_only_what_is_needed_gets_a_gradient(trained):
    leaves, labels = problem()
    names = ("h", "weight", "lora_A", "lora_B", "bias")
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name in trained)
    for reduction in ("mean", "none"):
        loss = fused(leaves, labels, reduction=reduction).sum()
        assert loss.requires_grad == bool(trained)
        if trained:
            loss.backward()
    assert [name for name, leaf in zip(names, leaves, strict=True) if leaf.grad is not None] == [
        name for name in names if name in trained
    ]


def test_under_autocast():
    leaves, labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(leaves, labels)
        h, weight, lora_A, lora_B, bias = leaves
        logits = F.linear(h, weight, bias) + SCALING * F.linear(F.linear(h, lora_A), lora_B)
        want = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    assert got.dtype == torch.float32
    exact = written_out([leaf.double() for leaf in leaves], labels).detach()
    assert (got - exact).abs() <= 2 * (want - exact).abs() + 1e-3
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(got, leaves))


def test_compiled_in_one_graph():
    leaves, labels = problem(torch.float32)
    compiled = torch.compile(lambda *ls: fused(list(ls), labels), fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), fused(leaves, labels)
    assert torch.equal(got, want)
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in (got, want)), strict=True):
        assert torch.equal(one, other)


def test_opcheck():
    leaves, labels = problem(torch.float32)
    h, weight, lora_A, lora_B, bias = leaves
    numbers = (SCALING, 0.0, 1.0, 0.0, 1.0, -100, 0.0, 0.0)
    arguments = (h.flatten(0, 1), weight, bias, lora_A, lora_B, labels.flatten(), None, *numbers)
    torch.library.opcheck(torch.ops.fastlora.head_sum, (*arguments, [True] * 5, "test"))
    torch.library.opcheck(torch.ops.fastlora.head_tokens, (*arguments, [True] * 4, "test"))


def test_a_second_derivative_raises():
    leaves, labels = problem()
    for loss in (fused(leaves, labels), fused(leaves, labels, reduction="none").sum()):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, leaves, create_graph=True)


def test_functional_transforms_take_the_reference():
    leaves, labels = problem()
    grads = torch.func.grad(lambda *ls: fused(list(ls), labels), argnums=(0, 2))(*leaves)
    want = torch.autograd.grad(written_out(leaves, labels), (leaves[0], leaves[2]))
    for one, other in zip(grads, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss_of", ["cross_entropy", "log_probs"])
def test_never_more_than_a_chunk_of_logits(loss_of, monkeypatch):
    monkeypatch.undo()
    t, v, k = 1024, 32000, 32
    h, weight = torch.randn(t, k, requires_grad=True), torch.randn(v, k) * k**-0.5
    lora_A, lora_B = torch.randn(4, k, requires_grad=True), torch.randn(v, 4, requires_grad=True)
    labels = torch.randint(v, (t,))

    def step() -> None:
        if loss_of == "log_probs":
            lora_linear_log_probs(h, weight, lora_A, lora_B, labels, 2.0).sum().backward()
        else:
            lora_linear_cross_entropy(h, weight, lora_A, lora_B, labels, 2.0).backward()

    assert allocations_of(step)[1].peak <= 0.45 * t * v * 4


def test_saved_for_backward():
    leaves, labels = problem(torch.float32)
    for leaf in (leaves[1], leaves[4]):
        leaf.requires_grad_(False)
    mine = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in mine:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fused(leaves, labels)
    gradients = sum(leaves[i].numel() * 4 for i in (0, 2, 3))
    assert sum(saved.values()) <= gradients + 64 and loss.requires_grad


H, W, A, B = torch.randn(6, 24), torch.randn(101, 24), torch.randn(4, 24), torch.randn(101, 4)
Y, WRONG = torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 101])
BAD: list[tuple[str, tuple, dict[str, Any]]] = [
    ("labels: got torch.float32, want integers", (H, W, A, B, Y.float(), 1.0), {}),
    (r"labels: got \(5,\), want \(6,\) for h \(6, 24\)", (H, W, A, B, Y[:5], 1.0), {}),
    (
        r"labels: got 101 \(1 such\), want words from 0 to 100",
        (H, W, A, B, torch.tensor([0, 1, 2, 3, 4, 101]), 1.0),
        {},
    ),
    (r"labels: got -1 \(1 such\)", (H, W, A, B, torch.tensor([0, 1, -1, 3, 4, 5]), 1.0), {}),
    ("lora_B: got None beside lora_A", (H, W, A, None, Y, 1.0), {}),
    ("lora_A: got None beside lora_B", (H, W, None, B, Y, 1.0), {}),
    (r"weight: got \(101, 23\) for h \(6, 24\)", (H, W[:, :23], A, B, Y, 1.0), {}),
    ("shapes: got", (H, W, A[:, :23], B, Y, 1.0), {}),
    ("dropout_p: got 1.5", (H, W, A, B, Y, 1.0), {"dropout_p": 1.5}),
    ("softcap: got -1.0", (H, W, A, B, Y, 1.0), {"softcap": -1.0}),
    ("want one dtype", (H.bfloat16(), W, A, B, Y, 1.0), {}),
]


@pytest.mark.parametrize("message, arguments, options", BAD, ids=[message for message, *_ in BAD])
@pytest.mark.parametrize("function", [lora_linear_cross_entropy, lora_linear_log_probs], ids=lambda f: f.__name__)
def test_bad_input(function, message, arguments, options):
    with pytest.raises(ValueError, match=message) as raised:
        function(*arguments, **options)
    assert str(raised.value).startswith(function.__name__ + ": ")


def test_losses_of_single_tokens_name_their_function_too():
    with pytest.raises(ValueError, match=r"^lora_linear_cross_entropy: labels: got 101"):
        lora_linear_cross_entropy(H, W, A, B, WRONG, 1.0, reduction="none")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "median"}, "reduction: got 'median', want one of mean, sum, none"),
        ({"label_smoothing": 1.1}, "label_smoothing: got 1.1"),
        ({"z_loss": -1.0}, "z_loss: got -1.0"),
        ({"reduction": "none", "num_items_in_batch": 3}, "num_items_in_batch: got one with reduction 'none'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lora_linear_cross_entropy(H, W, A, B, Y, 1.0, **options)
