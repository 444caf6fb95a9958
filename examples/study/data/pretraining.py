"""Models that the comparison pretrains itself: trained once, kept in a file, and trained again where the file is not
what the same training would give now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from study.curves import share_of_peak
from study.files import replacing
from study.progress import Progress

Weights = dict[str, torch.Tensor]


def pretrained(path: Path, facts: Mapping[str, Any], train: Callable[[], nn.Module]) -> Weights:
    """The weights in `path` where they were made by the same `facts` (settings, a hash of the data), else those of
    `train()`, which then replace the file in one step: it holds old weights or new ones whenever the process ends.
    """
    fingerprint = json.dumps({**facts, "torch": torch.__version__}, sort_keys=True)
    kept = _read(path, fingerprint)
    if kept is not None:
        return kept
    model = train()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            save_file(weights, temporary, metadata={"fingerprint": fingerprint})
        except SafetensorError as error:  # what a full disk is there
            raise OSError(f"{path}: {error}") from error
    return weights


def _read(path: Path, fingerprint: str) -> Weights | None:
    """None where there is no such file, where it is damaged, or of another fingerprint."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError):
        return None


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """Which weights they are, bit by bit: a fact of every trial that starts from them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fit(model: nn.Module, losses: Iterator[torch.Tensor], steps: int, lr: float, title: str) -> nn.Module:
    """Trains every weight with AdamW on the next `steps` losses, each computed after the step before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak(step, steps))
    with Progress(steps, title, lines=4) as progress:
        for _ in range(steps):
            loss = next(losses)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.advance(f"loss {loss.item():.3f}")
    return model
