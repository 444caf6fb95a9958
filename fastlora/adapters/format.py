"""PEFT's adapter files: what they hold, PEFT's rules for names, reading with every check, writing all or nothing.

This module knows the files only; load.py and save.py fit them to models.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..integrations.peft.starts import PLAIN_INITS
from ..introspect.names import from_pattern
from ..layers.checks import check_adapter_arguments
from ..layers.schedule import Allocation, RankSchedule
from ..runtime.checks import check_integer
from ..runtime.messages import some

CONFIG_NAME = "adapter_config.json"

WEIGHTS_NAME = "adapter_model.safetensors"

PICKLE_NAME = "adapter_model.bin"

PREFIX = "base_model.model."

# Settings of PEFT's LoraConfig under which the files hold something else than plain LoRA matrices.
_UNSUPPORTED = (
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "ensure_weight_tying",
)

# The fields of PEFT 0.21's LoraConfig and AdaLoraConfig besides those above.
_KNOWN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("runtime_config", "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora"),
    *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),
}

# Initialisations that change the base weights in a way that can be found again from the original ones, as PEFT finds
# it at each load. Not "pissa_niter_N" (PEFT draws it at random), nor what depends on data.
_REPEATABLE_INITS = ("pissa", "olora")

# By peft_type the tensors of one module, by the name of the layer's own dictionary: PEFT's suffix, and how many
# dimensions.
FACTORS = {
    "LORA": {"lora_A": (".weight", 2), "lora_B": (".weight", 2), "lora_magnitude_vector": ("", 1)},
    "ADALORA": {"lora_A": ("", 2), "lora_B": ("", 2), "lora_E": ("", 2)},
}

_KEYS = {
    kind: re.compile(
        r"(?:base_model\.model\.)?(?:(?P<name>.+)\.)?(?:"
        + "|".join(f"(?P<{factor}>{re.escape(factor + suffix)})" for factor, (suffix, _) in factors.items())
        + ")"
    )
    for kind, factors in FACTORS.items()
}

_EMBEDDING = re.compile(r"(?P<module>.+\.)?lora_embedding_(?P<factor>[AB])")

_WHOLE = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.base_layer|\.modules_to_save)?\.(?P<parameter>[^.]+)")

RANK_DIMS = {"lora_A": 0, "lora_B": 1, "lora_E": 0}

# AdaLoraConfig's names of a `RankSchedule`'s fields, and its defaults.
SCHEDULE = {
    "target_r": ("target_r", 8),
    "total_steps": ("total_step", None),
    "t_init": ("tinit", 0),
    "t_final": ("tfinal", 0),
    "delta_t": ("deltaT", 1),
    "beta1": ("beta1", 0.85),
    "beta2": ("beta2", 0.85),
}


class Spec(NamedTuple):
    """One layer's settings in an adapter."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool = False
    use_adalora: bool = False


class AdapterFile(NamedTuple):
    """What a directory holds: the configuration, and by module name lora_A (r, in), lora_B (out, r) and, of DoRA,
    lora_magnitude_vector (out,), of AdaLoRA lora_E (r, 1), whose r may be 0; by parameter name what PEFT saved whole
    (embeddings, modules_to_save); which of the modules are embeddings."""

    config: dict[str, Any]
    modules: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor]
    embeddings: frozenset[str] = frozenset()

    @property
    def is_adalora(self) -> bool:
        return self.config["peft_type"] == "ADALORA"

    @property
    def filled(self) -> list[str]:
        """The modules whose rank is not 0."""
        return [name for name, tensors in self.modules.items() if len(tensors["lora_A"])]

    @property
    def shift(self) -> str | None:
        """ "pissa" or "olora" where the adapter runs on base weights from which its start was taken, else None."""
        return None if self.is_adalora else _repeatable(self.config.get("init_lora_weights"))

    def allocation(self, name: str) -> Allocation:
        """How AdaLoRA's ranks were dealt out, and which of this module's are left."""
        kept = _kept(self.config.get("rank_pattern") or {}, f"{name}.lora_E" if name else "lora_E")
        return Allocation(_schedule(self.config), None if kept is None else tuple(kept))

    def cut_to_nothing(self, r: int) -> Allocation:
        """Of a layer whose r ranks are all gone, and with them its tensors."""
        return Allocation(_schedule(self.config), (False,) * r)

    def tensors(self, name: str, r: int) -> dict[str, Tensor]:
        """A module's tensors for an adapter of rank r: the file's own, or, for the rank that AdaLoRA began with, with
        zeros for the triplets that were cut."""
        found, kept = self.modules[name], self.allocation(name).kept if self.is_adalora else None
        if kept is None or len(kept) != r or len(found["lora_A"]) == r:
            return found
        whole = {}
        for factor, values in found.items():
            dim = RANK_DIMS[factor]
            shape = [r if i == dim else size for i, size in enumerate(values.shape)]
            index = torch.tensor([i for i, keep in enumerate(kept) if keep], dtype=torch.int64)
            whole[factor] = values.new_zeros(shape).index_copy(dim, index, values)
        return whole

    def spec(self, name: str, r: int | None = None) -> Spec:
        """A layer's settings: the configuration's, or its patterns' where one matches the name. With AdaLoRA the rank
        that is left, or r, and the alpha with which that has the file's scale, over the rank that it began with."""
        config, dropout = self.config, float(self.config.get("lora_dropout") or 0.0)
        if self.is_adalora:
            init_r, alpha, kept = config["init_r"], config["lora_alpha"], self.allocation(name).kept
            alpha = alpha if alpha > 0 else init_r  # PEFT's rule
            rank: int = r if r is not None else init_r if kept is None else sum(kept)
            return Spec(rank, alpha * rank / init_r, dropout, False, use_adalora=True)
        rank = from_pattern(config.get("rank_pattern"), name, config["r"])
        alpha = from_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        use_rslora, use_dora = bool(config.get("use_rslora", False)), bool(config.get("use_dora", False))
        return Spec(rank, alpha, dropout, use_rslora, use_dora)


def key(module: str, factor: str, peft_type: str, embedding: bool) -> str:
    """What PEFT calls a module's tensor in its files."""
    named = factor.replace("lora_", "lora_embedding_") if embedding else factor + FACTORS[peft_type][factor][0]
    return f"{PREFIX}{module}{'.' if module else ''}{named}"


def _repeatable(init: Any) -> str | None:
    return init.lower() if isinstance(init, str) and init.lower() in _REPEATABLE_INITS else None


def _schedule(config: dict[str, Any]) -> RankSchedule:
    return RankSchedule(**{field: config.get(key, default) for field, (key, default) in SCHEDULE.items()})


def _kept(pattern: Mapping[str, list[bool]], key: str) -> list[bool] | None:
    """What AdaLoRA's `rank_pattern` says of a lora_E; in PEFT's models an adapter's name follows."""
    return next((pattern[found] for found in pattern if found == key or found.startswith(f"{key}.")), None)


def changes_base(config: dict[str, Any]) -> bool:
    """Whether PEFT changes the base weights when it makes an adapter of this configuration."""
    if config.get("peft_type") == "ADALORA":
        return False
    init = config.get("init_lora_weights", True)
    return not any(init is plain or (isinstance(plain, str) and init == plain) for plain in PLAIN_INITS)


def places_of_experts(weights: Sequence[tuple[str, Any, str]]) -> dict[str, str]:
    """By the names of experts' weights, given with their modules and keys there, what PEFT's files call the modules of
    their adapters: it puts a wrapper around the module for each weight, the first one's innermost."""
    places = {}
    for name, module, key in weights:
        keys = {other for _, owner, other in weights if owner is module}
        ordered = [other for other in module._parameters if other in keys]
        place = name.removesuffix(key).removesuffix(".")
        places[name] = ".".join([place, *["base_layer"] * (len(ordered) - 1 - ordered.index(key))])
    return places


# Reading.
def read(root: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration (of a LoRA or AdaLoRA adapter) and the tensors, in full."""
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
    if peft_type not in FACTORS:
        raise ValueError(f"load_adapter: {root / CONFIG_NAME}: peft_type: got {peft_type!r}, want 'LORA' or 'ADALORA'")
    try:
        loaded = safetensors.torch.load((root / WEIGHTS_NAME).read_bytes())  # load_file wants names in UTF-8
        tensors = dict(sorted(loaded.items()))
    except SafetensorError as error:
        raise ValueError(
            f"load_adapter: {root / WEIGHTS_NAME}: truncated or not a safetensors file: {error}"
        ) from error
    return config, tensors


def parse(
    root: Path, config: dict[str, Any], tensors: dict[str, Tensor], experts: Mapping[str, tuple[str, int]]
) -> AdapterFile:
    """Checks the files against each other: settings and keys of LoRA, DoRA or AdaLoRA, each module's tensors together,
    and of the right rank. `experts`: by the module's name in the file the weight's, and how many experts it has."""
    _check_config(root / CONFIG_NAME, config)
    where = root / WEIGHTS_NAME
    factors, pattern = FACTORS[config["peft_type"]], _KEYS[config["peft_type"]]
    wanted = [factor for factor in factors if factor != "lora_magnitude_vector" or config.get("use_dora")]
    modules: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    unexpected, embeddings = [], set()
    for key, tensor in tensors.items():
        embedding = _EMBEDDING.fullmatch(key)
        plain = key if embedding is None else f"{embedding['module'] or ''}lora_{embedding['factor']}.weight"
        match = pattern.fullmatch(plain)
        factor = "" if match is None else next(factor for factor in factors if match[factor])
        fits = factor in wanted and tensor.is_floating_point() and tensor.dim() == factors[factor][1]
        if match is None and "lora_" not in key and (name := _WHOLE.fullmatch(key)) is not None:
            whole[f"{name['module']}.{name['parameter']}"] = tensor
        elif match is None or not fits:
            unexpected.append(f"{key} {tuple(tensor.shape)} {tensor.dtype}")
        else:
            name, count = experts.get(match["name"] or "", (match["name"] or "", 1))
            modules.setdefault(name, {})[factor], counts[name] = tensor, count
            embeddings.update([name] if embedding is not None else ())
    if unexpected:
        keys = ", ".join(f".{factor}{factors[factor][0]}" for factor in wanted)
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
    file = AdapterFile(config, modules, whole, frozenset(embeddings))
    for name, found in modules.items():
        ranks = {factor: tensor.shape[RANK_DIMS[factor]] for factor, tensor in found.items() if factor in RANK_DIMS}
        if set(ranks.values()) != {file.spec(name).r * counts[name]}:
            of_each = f" for each of {counts[name]} experts" if counts[name] > 1 else ""
            raise ValueError(
                f"load_adapter: {where}: {name!r}: {' and '.join(ranks)} have rank "
                f"{' and '.join(map(str, ranks.values()))}, {CONFIG_NAME} says {file.spec(name).r}{of_each}"
            )
    return file


def _check_config(where: Path, config: dict[str, Any]) -> None:
    features = [f"{key}={config[key]!r}" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") not in ("none", None):
        features.append(f"bias={config['bias']!r}")
    if unknown := sorted(config.keys() - _KNOWN - {*_UNSUPPORTED}):
        warnings.warn(
            f"fastlora.load_adapter: {where}: unknown settings {', '.join(map(repr, unknown))} are ignored; a newer "
            "PEFT may have written them",
            UserWarning,
            stacklevel=4,
        )
    init = config.get("init_lora_weights", True)
    if changes_base(config) and _repeatable(init) is None:
        features.append(
            f"init_lora_weights={init!r} (it changed the base weights, in a way that the files do not tell: where the "
            "adapter was trained, convert it with save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    if features:
        raise ValueError(f"load_adapter: {where}: not supported: {', '.join(features)}; load it with PEFT")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if config["peft_type"] == "ADALORA":
        _check_adalora(where, config)
        ranks, alphas = {}, {}  # the latter PEFT does not read, nor r
        config = {**config, "r": config["init_r"]}
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
        optional = value is None and (key != "target_modules" or config.get("target_parameters"))
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


def _check_adalora(where: Path, config: dict[str, Any]) -> None:
    init_r, pattern = config.get("init_r"), config.get("rank_pattern") or {}
    check_integer(f"load_adapter: {where}", "init_r", init_r)
    _schedule(config).checked(f"load_adapter: {where}")
    if not isinstance(pattern, dict) or not all(_is_list_of(bool, kept) for kept in pattern.values()):
        raise ValueError(f"load_adapter: {where}: rank_pattern: got {pattern!r}, want a list of bools for each lora_E")
    for key, kept in pattern.items():
        if len(kept) != init_r:
            raise ValueError(
                f"load_adapter: {where}: rank_pattern: got {len(kept)} bools for {key!r}, want init_r, {init_r}"
            )


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


# Writing.
def keys(file: bytes) -> list[str]:
    """The names of the tensors in a safetensors file."""
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return [key for key in header if key != "__metadata__"]


def write_files(files: dict[Path, bytes]) -> None:
    """All of them or none: written and synced next to their places, then renamed; a failure takes the renames back."""
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
