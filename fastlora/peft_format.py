"""PEFT's adapter files: what they hold, PEFT's rules for names, reading with every check, writing all or nothing.

This module knows the files only; checkpoint.py fits them to models.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .layers import check_adapter_arguments

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."

# Settings of PEFT's LoraConfig under which the files hold something else than plain LoRA matrices.
_UNSUPPORTED = (
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "ensure_weight_tying",
)
# Initialisations that leave the base weights alone; the others' adapters are right on the changed weights only.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Those among the others whose change of the base weights can be found again from the original ones, as PEFT does when
# it loads them. Not "pissa_niter_N" (PEFT draws it at random, anew at each load), nor what depends on data.
_REPEATABLE_INITS = ("pissa", "olora")
# The tensors of one module, by the name of the layer's own dictionary: PEFT's suffix, and how many dimensions.
FACTORS = {"lora_A": (".weight", 2), "lora_B": (".weight", 2), "lora_magnitude_vector": ("", 1)}
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:(?P<name>.+)\.)?(?:"
    + "|".join(f"(?P<{factor}>{re.escape(factor + suffix)})" for factor, (suffix, _) in FACTORS.items())
    + ")"
)


class Spec(NamedTuple):
    """One layer's settings in an adapter."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool = False


class AdapterFile(NamedTuple):
    """What a directory holds: the configuration, and by module name lora_A (r, in), lora_B (out, r) and, of DoRA,
    lora_magnitude_vector (out,)."""

    config: dict[str, Any]
    modules: dict[str, dict[str, Tensor]]

    @property
    def shift(self) -> str | None:
        """ "pissa" or "olora" where the adapter runs on base weights from which its start was taken, else None."""
        return _repeatable(self.config.get("init_lora_weights"))

    def spec(self, name: str) -> Spec:
        """A layer's settings: the configuration's, or its patterns' where one matches the name."""
        config = self.config
        r = from_pattern(config.get("rank_pattern"), name, config["r"])
        alpha = from_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        dropout, use_rslora = float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora", False))
        return Spec(r, alpha, dropout, use_rslora, bool(config.get("use_dora", False)))


def _repeatable(init: Any) -> str | None:
    return init.lower() if isinstance(init, str) and init.lower() in _REPEATABLE_INITS else None


def changes_base(config: dict[str, Any]) -> bool:
    """Whether PEFT changes the base weights when it makes an adapter of this configuration."""
    init = config.get("init_lora_weights", True)
    return not any(init is plain or (isinstance(plain, str) and init == plain) for plain in _PLAIN_INITS)


# Names.


def _ends_with_one_of(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def selects(config: dict[str, Any], name: str) -> bool:
    """Whether the configuration targets a module, by PEFT's rules."""
    exclude, targets = config.get("exclude_modules"), config["target_modules"]
    if exclude and (re.fullmatch(exclude, name) if isinstance(exclude, str) else _ends_with_one_of(name, exclude)):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    if not _ends_with_one_of(name, targets):
        return False
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if indices is None or indices == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for pattern in patterns:
        prefix = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        match = re.match(rf"{prefix}{pattern}\.(\d+)\.", name)
        if match:
            return int(match[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def from_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the name, from a dot or from the start."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def pattern(name: str) -> str:
    """A key of rank_pattern or alpha_pattern for this module and no other: PEFT reads it as a regular expression."""
    return f"^{re.escape(name)}"


def target_modules(targets: set[str], modules: set[str]) -> list[str] | str:
    """The modules' last names where those select exactly these, else full names, else a regular expression."""
    for names in ({name.rpartition(".")[2] for name in targets}, targets):
        if "" not in names and {name for name in modules if _ends_with_one_of(name, names)} == targets:
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(targets))


def some(names: Iterable[str]) -> str:
    """The first five names, and how many more."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# Reading.


def read(root: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration (of a LoRA adapter) and the tensors, in full."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"load_adapter: directory: {str(root)!r} {what}; want a local directory with {CONFIG_NAME} and "
            f"{WEIGHTS_NAME}"
        )
    if not (root / WEIGHTS_NAME).is_file() and (root / PICKLE_NAME).exists():
        raise ValueError(
            f"load_adapter: directory: {str(root)!r} has {PICKLE_NAME}, a pickle, which can run any code when it is "
            f"read; want {WEIGHTS_NAME}. If you trust it, load it with PEFT and save it again with save_pretrained"
        )
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if not (root / file).is_file():
            below = sorted(path.parent.name for path in root.glob(f"*/{file}"))
            hint = f"; there are adapters in its subdirectories {', '.join(below)}" if below else ""
            raise FileNotFoundError(f"load_adapter: directory: no {file} in {str(root)!r}{hint}")
    try:
        config = json.loads((root / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_adapter: {root / CONFIG_NAME}: not valid JSON: {error}") from error
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "LORA":
        raise ValueError(f"load_adapter: {root / CONFIG_NAME}: peft_type: got {peft_type!r}, want 'LORA'")
    try:
        tensors = safetensors.torch.load_file(root / WEIGHTS_NAME, device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"load_adapter: {root / WEIGHTS_NAME}: truncated or not a safetensors file: {error}"
        ) from error
    return config, tensors


def parse(root: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterFile:
    """Checks the files against each other: settings and keys of LoRA or DoRA, each module's tensors together, and of
    the right rank."""
    _check_config(root / CONFIG_NAME, config)
    where = root / WEIGHTS_NAME
    wanted = [factor for factor in FACTORS if factor != "lora_magnitude_vector" or config.get("use_dora")]
    modules: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        factor = "" if match is None else next(factor for factor in FACTORS if match[factor])
        fits = factor in wanted and tensor.is_floating_point() and tensor.dim() == FACTORS[factor][1]
        if match is None or not fits:
            unexpected.append(f"{key} {tuple(tensor.shape)} {tensor.dtype}")
        else:
            modules.setdefault(match["name"] or "", {})[factor] = tensor
    if unexpected:
        keys = ", ".join(f".{factor}{FACTORS[factor][0]}" for factor in wanted)
        raise ValueError(
            f"load_adapter: {where}: {len(unexpected)} tensors that are no LoRA matrices: {some(unexpected)}; "
            f"want keys {PREFIX}<module> and one of {keys}"
        )
    alone = sorted(name for name, found in modules.items() if len(found) < len(wanted))
    if alone or not modules:
        raise ValueError(
            f"load_adapter: {where}: want {', '.join(wanted)} for every module, got only some of them for {some(alone)}"
            if alone
            else f"load_adapter: {where}: holds no tensors"
        )
    file = AdapterFile(config, modules)
    for name, found in modules.items():
        got = (found["lora_A"].shape[0], found["lora_B"].shape[1])
        if got != (file.spec(name).r,) * 2:
            raise ValueError(
                f"load_adapter: {where}: {name!r}: lora_A and lora_B have rank {got[0]} and {got[1]}, "
                f"{CONFIG_NAME} says {file.spec(name).r}"
            )
    return file


def _check_config(where: Path, config: dict[str, Any]) -> None:
    features = [f"{key}={config[key]!r}" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") not in ("none", None):
        features.append(f"bias={config['bias']!r}")
    init = config.get("init_lora_weights", True)
    if changes_base(config) and _repeatable(init) is None:
        features.append(
            f"init_lora_weights={init!r} (it changed the base weights, in a way that the files do not tell: where the "
            "adapter was trained, convert it with save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    if features:
        raise ValueError(f"load_adapter: {where}: not supported: {', '.join(features)}; load it with PEFT")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for key, value in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(value, dict):
            raise ValueError(f"load_adapter: {where}: {key}: got {value!r}, want a value for each pattern")
    try:
        for r in (config.get("r"), *ranks.values()):
            check_adapter_arguments("x", r, 1, 0.0, caller="")  # type: ignore[arg-type]
        for alpha in (config.get("lora_alpha"), *alphas.values()):
            check_adapter_arguments("x", 1, alpha, config.get("lora_dropout") or 0.0, caller="")  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"load_adapter: {where}{error}") from error
    names = {key: config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")}
    for key, value in names.items():
        optional = value is None and key != "target_modules"
        if not (optional or isinstance(value, str) or _is_list_of(str, value)):
            raise ValueError(f"load_adapter: {where}: {key}: got {value!r}, want a list of names or a string")
    indices = config.get("layers_to_transform")
    if not (indices is None or isinstance(indices, int) or _is_list_of(int, indices)):
        raise ValueError(f"load_adapter: {where}: layers_to_transform: got {indices!r}, want integers")
    for expression in (*ranks, *alphas, *(value for value in names.values() if isinstance(value, str))):
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"load_adapter: {where}: {expression!r} is no regular expression: {error}") from error


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


# Writing.


def write_files(files: dict[Path, bytes]) -> None:
    """All of them or none: written and synced beside their places, then renamed; a failure takes the renames back."""
    token = secrets.token_hex(4)
    temporary = {path: path.with_name(f".{path.name}.{token}.tmp") for path in files}
    backups = {path: path.with_name(f".{path.name}.{token}.old") for path in files}
    made: list[Path] = []
    renamed: list[Path] = []
    try:
        for folder in dict.fromkeys(path.parent for path in files):
            made += [path for path in [*reversed(folder.parents), folder] if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            _write_synced(temporary[path], data)
        for path in files:
            if path.exists():
                _keep(path, backups[path])
        for path in files:
            os.replace(temporary[path], path)
            renamed.append(path)
        for folder in {path.parent for path in files}:
            _sync_directory(folder)
    except BaseException:
        for path in renamed:
            if backups[path].exists():
                backups[path].replace(path)
            else:
                path.unlink(missing_ok=True)
        _remove([*temporary.values(), *backups.values()])
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    _remove([*backups.values()])


def _keep(path: Path, backup: Path) -> None:
    try:
        os.link(path, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(path, backup)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    """So that the renames survive a power failure, on systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
