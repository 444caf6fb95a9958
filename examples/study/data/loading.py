"""Where the models of `--model` are, and what is said of one that does not load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def place_of(model: str) -> str:
    """A directory, or the name that was given. Raises FileNotFoundError for a directory without a model."""
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"--model {model}: this directory has no config.json; want one written by save_pretrained"
        )
    return str(path) if path.is_dir() else model


def transformers() -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def load(load_pretrained: Callable[[], Any], what: str, source: str, wanted: str) -> Any:
    """Raises FileNotFoundError where the encoder, model or tokenizer at `source` does not load."""
    try:
        return load_pretrained()
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"--model {source}: its {what} does not load; want {wanted} ({reason})") from error
