"""Model folders in Hugging Face's layout: `config.json`, `model.safetensors` or its shards,
tokenizer files.

Weights are safetensors only: opening a pickle can run code, so pickles are refused.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.files import new_file, read_json, sha256_file, sha256_json, write_json
from xinslm.model.config import ModelConfig, UnsupportedModelError
from xinslm.model.transformer import Transformer

WEIGHTS = "model.safetensors"
QUANTIZED_WEIGHTS = "quantized.safetensors"
"""Codes and scales that `xinslm quantize` writes. If they were named `WEIGHTS`, transformers would
load the folder with random weights; with this name it refuses the folder.
"""
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def resolve_model(path: Path | str) -> Path:
    """Find the model folder that `path` refers to: a model folder, a run's best checkpoint, or a
    Hub name, which is downloaded.
    """
    folder = Path(path)
    for candidate in (folder, folder / "checkpoints" / "best", folder / "checkpoints" / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    if folder.exists():
        raise UsageError(
            f"{folder} is not a model folder: it has no config.json (and no "
            "checkpoints/best/config.json)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UsageError(
            f"there is no model at {path}: give a model folder, a run folder or a Hub name with "
            "its owner, OWNER/NAME, such as openai-community/gpt2"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=HUB_FILES))
    # the hub client raises a dozen kinds: offline, no such repository, gated
    except Exception as error:
        raise UsageError(
            f"there is no folder {path}, and the Hub returned no model of that name: {error}"
        ) from error


def require_context(max_seq_length: int, context: int, who: str) -> None:
    """Raise UsageError if the context of `who` ("teacher X") is less than `max_seq_length`."""
    if max_seq_length > context:
        raise UsageError(
            f"max_seq_length is {max_seq_length}, but {who} has a context of {context} tokens: "
            f"pass --max-seq-length {context}"
        )


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a Llama or Mistral folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a model folder: it has no config.json")
    return ModelConfig.from_hf(read_json(path), str(path))


def require_layers(num_layers: int, num_tensors: int, where: str) -> None:
    """Raise XinslmError if `num_tensors` weights are fewer than one per layer.

    Call it before the model is built: building 10^12 layers without weights would never end.
    """
    if num_tensors < num_layers:
        raise XinslmError(
            f"{where} has {num_layers:,} layers, but the model's files contain only "
            f"{num_tensors:,} weights. Copy the model again"
        )


def require_weights(config: ModelConfig, num_tensors: int, num_bytes: int, where: str) -> None:
    """Raise XinslmError if this many tensors and bytes cannot make a model of this shape."""
    require_layers(config.num_hidden_layers, num_tensors, where)
    if config.num_parameters > 8 * num_bytes:  # no format takes less than a bit
        raise XinslmError(
            f"{where} has {config.num_parameters:,} parameters, but the model's files contain "
            f"only {num_bytes:,} bytes. Copy the model again"
        )


def count_tensors(folder: Path) -> int:
    """Return the number of tensors in the safetensors files of a model folder."""
    total = 0
    for file in weight_files(folder):
        with open_tensors(file) as tensors:
            total += len(tensors.keys())
    return total


def is_own(folder: Path) -> bool:
    """Return whether our `Transformer` supports a folder's model; transformers runs all others."""
    try:
        load_config(folder)
    except UnsupportedModelError:
        return False
    return True


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, all shards; XinslmError if it has only
    pickles.
    """
    folder = Path(folder)
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not all(
            isinstance(name, str) for name in places.values()
        ):
            raise XinslmError(
                f"{index}: must contain a 'weight_map' from weights to files. Copy the complete "
                "model folder"
            )
        files = [folder / name for name in sorted(set(places.values()))]
        for file in files:
            if not file.is_file():
                raise XinslmError(
                    f"{file} is missing; {index.name} lists it. Copy the complete model folder"
                )
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(
        p.name for suffix in ("bin", "pt", "pth", "ckpt", "pkl") for p in folder.glob(f"*.{suffix}")
    )
    if pickles:
        raise XinslmError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when opened; "
            "xinslm reads only safetensors. If you trust the file, load it with transformers and "
            "convert it with save_pretrained"
        )
    if (folder / QUANTIZED_WEIGHTS).is_file():
        raise UsageError(f"{folder} is quantized; pass the model that it was made from")
    raise XinslmError(f"{folder} has no {WEIGHTS}")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor of each weight of a model folder, from a memory map."""
    for file in weight_files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def open_tensors(file: Path) -> safe_open:
    """Open a safetensors file; XinslmError if it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise XinslmError(
            f"{file} is not a complete safetensors file ({error}); copy or create it again"
        ) from None


def load_model(
    folder: Path | str, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False
) -> Transformer:
    """Load a Llama or Mistral folder as a `Transformer`, with weights of type `dtype`."""
    folder = resolve_model(folder)
    config = load_config(folder)
    num_bytes = sum(file.stat().st_size for file in weight_files(folder))
    require_weights(config, count_tensors(folder), num_bytes, f"{folder}/config.json")
    with torch.device("meta"):
        model = Transformer(config, gradient_checkpointing)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for name, tensor in read_tensors(folder):
        if (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith(
            "rotary_emb.inv_freq"
        ):
            continue
        if name not in expected:
            raise XinslmError(
                f"{folder}: weight '{name}' is not part of a {config.to_hf()['model_type']} model"
            )
        if tensor.shape != expected[name]:
            raise XinslmError(
                f"{folder}: weight '{name}' has shape {tuple(tensor.shape)}, "
                f"but config.json requires {tuple(expected[name])}"
            )
        loaded[name] = tensor.to(dtype)
    missing = sorted(expected.keys() - loaded.keys())
    if missing:
        raise XinslmError(
            f"{folder}: {len(missing)} weights are missing, the first is '{missing[0]}'"
        )
    model.load_state_dict(loaded, assign=True)
    rebuild_buffers(model)
    return model.eval()


def rebuild_buffers(model: Transformer) -> None:
    """Compute the rotary frequencies of a model that was created on the meta device."""
    from xinslm.model.transformer import rotary_frequencies

    model.frequencies = rotary_frequencies(model.config)


def save_model(model: Transformer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` into `folder`; a tied head is written once.

    `dtype` is the type on disk, by default that of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    kinds = {tensor.dtype for tensor in tensors.values()}
    name = str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "float32"
    write_json(folder / "config.json", {**model.config.to_hf(), "dtype": name})
    write_json(
        folder / "generation_config.json",
        {
            k: v
            for k in ("bos_token_id", "eos_token_id", "pad_token_id")
            if (v := getattr(model.config, k)) is not None
        },
    )
    with new_file(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def model_fingerprint(folder: Path) -> str:
    """Return a hash of a model's weights and configuration, independent of the folder's name."""
    folder = Path(folder)
    files = [folder / "config.json", *weight_files(folder)]
    return sha256_json([[os.path.basename(file), sha256_file(file)] for file in files])


def check_vocabulary(rows: int, tokenizer: Any, name: str) -> None:
    """Raise XinslmError if the tokenizer has more ids than the model's embedding has rows."""
    if tokenizer.vocab_size > rows:
        raise XinslmError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} ids, but the model's embedding "
            f"only {rows:,} rows; the tokenizer belongs to another model"
        )
