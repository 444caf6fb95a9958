"""PEFT's lora_A and lora_B where an adapter did not start at zero: a trained half, and a frozen one that takes the
start away again.

LoRA-GA with an untouched base runs s·(B A − B₀A₀) = s·[B, −B₀][A; A₀]. `begin` makes that of PEFT's two linear layers,
in place, by a change of their class: their `weight` is then the whole factor of rank 2r, so that whatever PEFT does
with it (forwards of every kind of base layer, merging, saving, status) is right without knowing, and one dropout mask
serves both halves. Only the trained half is a parameter, and it is the one that was there: optimisers keep theirs. On
disk and in state_dicts there is one `weight` of rank 2r, an ordinary adapter of the original base.

Nothing of PEFT is imported here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from . import sharding


class StartedLinear(nn.Linear):
    """A factor of an adapter with a start: `trained` (r rows or columns) and the frozen `start` (as many).

    Never constructed: `begin` turns PEFT's linear layers into such, `end` turns them back.
    """

    trained: nn.Parameter
    start: Tensor
    dim: int  # along which the halves are put together: 0 in lora_A (r, in), 1 in lora_B (out, r)
    beside: bool  # the start runs beside the trained half; otherwise the base weight was shifted by it, and it is kept
    # for the file only

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._both_halves(self.trained) if self.beside else self.trained

    def _both_halves(self, trained: Tensor) -> Tensor:
        """FSDP2 shards the trained half, a parameter, and gives it another dtype while its module runs; the frozen
        one, a buffer, it leaves alone."""
        return torch.cat((trained, sharding.replicated(self.start.to(trained.dtype), trained)), self.dim)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        trained = self.trained if keep_vars else self.trained.detach()
        destination[prefix + "weight"] = self._both_halves(trained)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        whole = sharding.whole(own.pop(prefix + "weight", None))
        if whole is not None:
            wanted = list(self.trained.shape)
            wanted[self.dim] *= 2
            if list(whole.shape) != wanted:
                error_msgs.append(
                    f"size mismatch for {prefix}weight: copying a param with shape {tuple(whole.shape)}, the shape in "
                    f"current model is {tuple(wanted)}: a trained half and LoRA-GA's frozen start."
                )
                return
            trained, start = (half.clone() for half in whole.chunk(2, self.dim))
            if not self.beside and not _nearly_equal(start, self.start):
                error_msgs.append(
                    f"{prefix}weight has another start than the one that this base weight was shifted by "
                    '(base="offset"): want an adapter of the same start.'
                )
                return
            own |= {prefix + "trained": sharding.spread(trained, self.trained), prefix + "start": start}
        missing: list[str] = []
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        halves = (prefix + "trained", prefix + "start")
        missing_keys.extend(dict.fromkeys(prefix + "weight" if key in halves else key for key in missing))


def begin(down: nn.Linear, up: nn.Linear, a0: Tensor, minus_b0: Tensor, beside: bool) -> None:
    """Gives lora_A and lora_B their frozen halves A₀ (r, in) and −B₀ (out, r), of their own dtypes, in place."""
    for linear, start, dim in ((down, a0, 0), (up, minus_b0, 1)):
        _rename(linear, "weight", "trained")
        linear.__class__ = StartedLinear
        started = cast(StartedLinear, linear)
        started.register_buffer("start", start)
        started.dim, started.beside = dim, beside
    if beside:
        down.out_features, up.in_features = 2 * a0.shape[0], 2 * a0.shape[0]


def end(down: nn.Linear, up: nn.Linear) -> None:
    """Takes the frozen halves away again; the trained ones stay. Nothing happens where there are none."""
    for linear, dim in ((down, 0), (up, 1)):
        if isinstance(linear, StartedLinear):
            linear._buffers.pop("start", None)
            for attribute in ("dim", "beside"):
                linear.__dict__.pop(attribute, None)
            cast(nn.Module, linear).__class__ = nn.Linear
            _rename(linear, "trained", "weight")
            down.out_features = up.in_features = linear.weight.shape[dim]


def _rename(module: nn.Module, old: str, new: str) -> None:
    """A parameter's name, at its place in the order."""
    parameters = {new if key == old else key: value for key, value in module._parameters.items()}
    module._parameters.clear()
    module._parameters.update(parameters)


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    """To half precision's rounding, in which an adapter may have been saved."""
    b = b.detach().float()
    return bool((a.to(b) - b).abs().max() <= 2**-7 * b.abs().max())
