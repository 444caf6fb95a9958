"""How many bytes a forward pass keeps for its backward pass, counted by autograd's own hooks: on any device."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .contenders import Contender


def saved_bytes(contender: Contender, x: Tensor) -> int:
    """The storages that autograd has saved when the forward pass is over, each counted once; parameters are not: they
    are there anyway. x is counted where it is saved, since without the adapter nobody would have to keep it.

    What a pass computes into a view of a larger tensor counts as the whole of that. A tensor that a custom function
    keeps without telling autograd would be missed; none here does.
    """
    model = getattr(contender, "parameters", ())
    owned = {parameter.untyped_storage().data_ptr() for parameter in (*contender.leaves, *model)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = contender.forward(x)
    del y
    return sum(found.values())
