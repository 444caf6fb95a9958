"""Two gloo processes, the model that they train, and what one process makes of the same data."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.ops import call, reference
from fastlora.ops.lora import autograd as lora_autograd

R = 3
STEPS = 3
TARGETS = ["up", "down"]
WORLD = 2
# Plain patched models, PEFT's, both after LoRA-GA, whose adapters have a frozen half, and both with DoRA.
KINDS = ("plain", "peft", "plain-ga", "peft-ga", "plain-dora", "peft-dora")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 13), nn.Linear(13, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Layers of odd sizes, so that the processes' shards differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def whole_batch(step: int = 0) -> Tensor:
    return torch.randn(2 * WORLD, 5, 8, generator=torch.Generator().manual_seed(step))


def own_batch(step: int = 0) -> Tensor:
    return whole_batch(step).chunk(WORLD)[dist.get_rank()]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def build(kind: str = "plain", **settings: Any) -> nn.Module:
    """The same adapters in every process: nothing but the seed decides."""
    model: nn.Module = Net()
    torch.manual_seed(1)
    started = kind.endswith("-ga")
    settings = {"init_lora_weights": started, "use_dora": kind.endswith("-dora"), **settings}
    if kind.startswith("peft"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=6, target_modules=TARGETS, **settings))
        fastlora.patch(model)
    else:
        fastlora.patch(model, r=R, lora_alpha=6, target_modules=TARGETS, **settings)
    if started:
        with fastlora.GradientSketch(model, r=R, target_modules=TARGETS) as sketch:
            loss_of(model, whole_batch()).backward()
        fastlora.init_lora_ga(model, sketch)
    return model


def net(model: nn.Module) -> Net:
    """The network inside PEFT's wrappers."""
    inner: Any = model.base_model.model if hasattr(model, "peft_config") else model  # type: ignore[union-attr]
    return inner


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=0.01, momentum=0.5)


def train(model: nn.Module, batch: Callable[[int], Tensor], steps: int = STEPS) -> list[float]:
    """The losses, averaged over the processes where `batch` gives each its own."""
    optimizer, losses = optimizer_of(model), []
    for step in range(steps):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_of(loss))
    return losses


def mean_of(loss: Tensor) -> float:
    """Over the processes; of what every process has whole it is the same."""
    total = loss.detach().double().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter, whole."""
    tensors: dict[str, Any] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {
        name.removeprefix("module."): (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
        for name, tensor in tensors.items()
    }


def assert_close(got: Any, want: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)


@contextlib.contextmanager
def spied() -> Iterator[dict[str, set]]:
    """Which way the calls of LoRA layers go: {"fused" or "eager": dtypes of the weights they were given}."""
    seen: dict[str, set] = {}
    fused, eager = lora_autograd.lora_linear, reference.lora_linear

    def note(way: str, function: Callable) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(way, set()).add(args[1].dtype)
            return function(*args, **kwargs)

        return noted

    lora_autograd.lora_linear, reference.lora_linear = note("fused", fused), note("eager", eager)
    try:
        yield seen
    finally:
        lora_autograd.lora_linear, reference.lora_linear = fused, eager


class Traffic(TorchDispatchMode):
    """How many numbers collectives make of what they are given: what is gathered, summed or sent, padding included."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # to be seen as what its operation is made of
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "c10d" in name and "wait" not in name and "wrap" not in name:
            given = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.numbers += given.numel() * (dist.get_world_size() if "all_gather" in name else 1)
        return result


def raised(error: type[Exception], do: Callable[[], Any]) -> str:
    """The message of what must be raised, in every process."""
    try:
        do()
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error.__name__} was raised")


# Starting the processes.
def outcome_of(checks: list[Callable[[str], None]], world: int = WORLD) -> dict[str, str]:
    """Runs the checks one after another in all processes; by name, "" for what passed, else what went wrong."""
    outcome = {check.__name__: "not reached: an earlier check failed" for check in checks}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, checks, world), nprocs=world)  # type: ignore[attr-defined]
        for check in checks:
            logs = [Path(folder, f"{check.__name__}-{rank}.log") for rank in range(world)]
            if all(log.exists() for log in logs):
                outcome[check.__name__] = "\n".join(log.read_text() for log in logs).strip()
    return outcome


def _process(rank: int, folder: str, checks: list[Callable[[str], None]], world: int) -> None:
    torch.set_num_threads(1)
    call.SMALL = 0  # these layers are small, and the fused Function is what is to be seen
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )
    for check in checks:
        error = ""
        own = Path(folder, check.__name__)
        own.mkdir(exist_ok=True)
        try:
            check(str(own))
        except Exception:
            error = f"rank {rank}: {traceback.format_exc()}"
        Path(folder, f"{check.__name__}-{rank}.log").write_text(error)
        failed = torch.tensor(len(error))
        with contextlib.suppress(RuntimeError):  # the other process waits for this one somewhere else
            dist.all_reduce(failed)
        if failed:
            break
    # Every outcome is on disk. The teardown of the process group and of the interpreter is left out: a run whose checks
    # had all passed was aborted in it over a C++ thread still alive ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
