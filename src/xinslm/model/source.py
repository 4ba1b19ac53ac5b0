"""A model in any kind of file: its shape, its weights by Hugging Face's names, its fingerprint.

`ModelSource` is what every stage reads; `open_model` (files.py) chooses the class. Weights are read
on demand, one at a time. This file has the base class and the Hugging Face folder; quantized.py the
folder of `xinslm quantize`; gguf.py llama.cpp's file.

Weights of folders are safetensors only: opening a pickle can run code, so pickles are refused.
"""

import math
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.files import (
    MANIFEST,
    file_stamp,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from xinslm.model.config import ModelConfig, UnsupportedModelError
from xinslm.model.finite import all_finite
from xinslm.model.names import CONFIG, GENERATION
from xinslm.model.stored import StoredWeight
from xinslm.model.transformer import Transformer
from xinslm.model.weight_files import safetensors_files
from xinslm.ranges import Activations

TRAINED_FOR_Q4_0 = {"quantization_aware": "q4_0"}
"""Entry of config.json: these weights were trained with `rounded` (param_dtype.py) of them."""
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
_TABLE_ROWS = 16_384
_LAYER_COUNTS = {"num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers"}


class ModelSource:
    """Base of the kinds of model; a subclass gives settings, files, names, shapes and tensors."""

    kind = "model"
    """What reports call it: model, quantized, gguf."""
    settings: dict[str, Any]
    """The content of config.json."""
    files: list[Path]
    """All files that the model consists of, without its tokenizer."""
    names: list[str]
    """Hugging Face's names of the stored weights."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, Path(path)
        self.where = f"{self.path}/{CONFIG}"
        """The file that the shape comes from, for messages."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one weight."""
        raise NotImplementedError

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one weight, or its rows [start, stop), as stored; float32 if it was quantized."""
        raise NotImplementedError

    @property
    def calibration(self) -> list[str]:
        """Ids of the texts that calibrated the model's quantization (`data/text_ids.py`)."""
        return []

    def stored(self, name: str) -> StoredWeight | None:
        """One weight as codes of our grids, without rounding; None if it has none."""
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and tensor of each weight."""
        for name in self.names:
            yield name, self.tensor(name)

    @cached_property
    def config(self) -> ModelConfig:
        """The shape, if our `Transformer` supports it; else UnsupportedModelError."""
        return ModelConfig.from_hf(self.settings, self.where)

    @property
    def is_own(self) -> bool:
        """Whether our `Transformer` supports the model; transformers runs all others."""
        try:
            return bool(self.config)
        except UnsupportedModelError:
            return False

    @property
    def weight_files(self) -> list[Path]:
        """The files with the weights."""
        return [file for file in self.files if file.suffix != ".json"]

    @property
    def weight_bytes(self) -> int:
        """Total size of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def num_weights(self) -> int:
        """Number of stored numbers, a tied embedding counted once."""
        return sum(math.prod(self.shape_of(name)) for name in self.names)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and configuration, independent of the folder's name."""
        self._stamps = [file_stamp(file) for file in self.files]
        return self._hash_files()

    def _hash_files(self) -> str:
        return sha256_json([[file.name, sha256_file(file)] for file in self.files])

    def require_unchanged(self) -> None:
        """Raise XinslmError if a file is not what it was when `fingerprint` was computed; a copy
        with the same content is.
        """
        fingerprint = self.fingerprint
        stamps = [file_stamp(file) for file in self.files]
        changed = [
            file
            for file, old, new in zip(self.files, self._stamps, stamps, strict=True)
            if old != new
        ]
        if not changed:
            return
        if None in stamps or self._hash_files() != fingerprint:
            raise XinslmError(
                f"{changed[0]} was replaced or deleted while it was being read. Put the file back "
                "that was there when the command began, and run it again; or begin anew with the "
                "other file"
            )
        self._stamps = stamps

    def save_config(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, which names `dtype`, and generation_config.json into `folder`."""
        write_config(self.settings, folder, dtype)

    def require(self) -> None:
        """Raise XinslmError if these weights cannot make a model of the stated shape.

        Call it before a model is built: building 10^12 layers without weights would never end.
        """
        parts = [self.settings, *self.settings.values()]  # also of parts of a model
        for part in (part for part in parts if isinstance(part, dict)):
            for key in _LAYER_COUNTS & part.keys():
                if isinstance(part[key], int) and part[key] > len(self.names):
                    raise XinslmError(
                        f"{self.where} has {part[key]:,} layers, but the model's files contain "
                        f"only {len(self.names):,} weights. Copy the model again"
                    )
        if not self.is_own:
            return
        # no format takes less than a bit
        if self.config.num_parameters > 8 * self.weight_bytes:
            raise XinslmError(
                f"{self.where} has {self.config.num_parameters:,} parameters, but the model's "
                f"files contain only {self.weight_bytes:,} bytes. Copy the model again"
            )

    def require_weights(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Return the names of the weights to read; XinslmError unless they are those expected."""
        is_tied = bool(self.settings.get("tie_word_embeddings"))
        self.require_tied()
        found = [
            name
            for name in self.names
            if not (name == HEAD and is_tied) and not name.endswith(".inv_freq")
        ]
        for name in found:
            if name not in expected:
                raise XinslmError(
                    f"{self.path}: weight '{name}' is not part of a "
                    f"{self.settings['model_type']} model"
                )
            if self.shape_of(name) != expected[name]:
                raise XinslmError(
                    f"{self.path}: weight '{name}' has shape {self.shape_of(name)}, "
                    f"but {self.where} requires {expected[name]}"
                )
        if missing := sorted(expected.keys() - set(found)):
            raise XinslmError(
                f"{self.path}: {len(missing)} weights are missing, the first is '{missing[0]}'"
            )
        return found

    def require_tied(self) -> None:
        """Raise XinslmError if config.json ties an LM head that the files have, and that differs.

        transformers 5 takes the files' head then, earlier versions the embedding.
        """
        if not self.settings.get("tie_word_embeddings") or not {HEAD, TABLE} <= {*self.names}:
            return
        count, *_ = shape = self.shape_of(TABLE)
        parts = [(i, min(i + _TABLE_ROWS, count)) for i in range(0, count, _TABLE_ROWS)]
        if self.shape_of(HEAD) != shape or not all(
            torch.equal(self.tensor(HEAD, *part).float(), self.tensor(TABLE, *part).float())
            for part in parts
        ):
            raise XinslmError(
                f"{self.path}: {CONFIG} ties the LM head to the embedding, but the file has "
                f"another '{HEAD}'. Set tie_word_embeddings to false if that one is meant, or "
                "delete it from the file"
            )

    def rows(self, name: str, shape: tuple[int, ...], start: int = 0, stop: int = -1) -> Tensor:
        """Read rows of a weight as float32; XinslmError if it is missing, misshapen or not
        finite.
        """
        if name not in self.names:
            raise XinslmError(f"{self.path}: weight '{name}' is missing")
        if self.shape_of(name) != shape:
            raise XinslmError(
                f"{self.path}: weight '{name}' has shape {self.shape_of(name)}, but {self.where} "
                f"requires {shape}"
            )
        rows = self.tensor(name, start, shape[0] if stop < 0 else stop).float()
        if not all_finite(rows):
            raise XinslmError(
                f"{self.path}: weight '{name}' holds NaN or infinity; the model is broken"
            )
        return rows

    def transformer(
        self,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        activations: Activations = "float",
    ) -> Transformer:
        """Load the model as our `Transformer`, with weights of type `dtype`.

        With `activations="int8"` the inputs of linear layers whose weights have codes are rounded
        (`int8_inputs.py`); UsageError if none has, or if `dtype` is not float32.
        """
        config = self.config
        is_int8 = activations == "int8"
        if is_int8 and dtype != torch.float32:
            raise UsageError(
                "--activations int8 computes all else in float32: pass --dtype float32"
            )
        self.require()
        with torch.device("meta"):
            model = Transformer(config, gradient_checkpointing)
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        names = self.require_weights(shapes)
        loaded, coded = {}, []
        for name in names:
            weight = self.stored(name) if is_int8 else None
            if weight is not None and weight.scales is not None:
                loaded[name] = weight.dequantize()
                coded.append(name)
            else:
                loaded[name] = self.tensor(name).to(dtype)
        model.load_state_dict(loaded, assign=True)
        model.round_inputs(coded)
        if is_int8 and model.int8_layers[0] == 0:
            raise UsageError(
                f"{self.path} has no linear layer with 4-bit or 8-bit codes in symmetric groups of "
                "32, which --activations int8 needs; make them with `xinslm quantize`"
            )
        return model.eval()

    def pretrained_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `from_pretrained` of transformers' class loads this."""
        from transformers import AutoConfig

        settings = {key: value for key, value in self.settings.items() if key != "model_type"}
        return {
            "pretrained_model_name_or_path": None,
            "config": AutoConfig.for_model(self.settings["model_type"], **settings),
            "state_dict": dict(self.tensors()),
        }


class FolderSource(ModelSource):
    """A folder in Hugging Face's layout: `config.json`, `model.safetensors` or its shards."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, path)
        if not (self.path / CONFIG).is_file():
            inner = sorted(file.name for file in self.path.glob("*.gguf"))
            hint = f". It contains {inner[0]}: give that file" if inner else ""
            raise UsageError(
                f"{self.path} is not a model folder: it has no {CONFIG} (and no "
                f"checkpoints/best/{CONFIG}){hint}"
            )

    @cached_property
    def settings(self) -> dict[str, Any]:  # type: ignore[override]
        """The content of config.json."""
        settings = read_json(self.path / CONFIG)
        if not isinstance(settings, dict):
            raise XinslmError(
                f"{self.where}: must hold an object, but holds {type(settings).__name__}"
            )
        return settings

    @property
    def calibration(self) -> list[str]:
        """Ids of the texts that calibrated the model's quantization, from the manifest."""
        path = self.path / MANIFEST
        manifest = read_json(path) if path.is_file() else None
        found = manifest.get("calibration") if isinstance(manifest, dict) else None
        return [str(id) for id in found] if isinstance(found, list) else []

    @cached_property
    def files(self) -> list[Path]:  # type: ignore[override]
        """config.json and the safetensors files, all shards; XinslmError for pickles."""
        return [self.path / CONFIG, *safetensors_files(self.path)]

    @property
    def weight_files(self) -> list[Path]:
        """The files with the weights."""
        return self.files[1:]

    @cached_property
    def _handles(self) -> dict[str, Any]:
        handles: dict[str, Any] = {}
        for file in self.weight_files:
            handle = open_tensors(file)
            handles.update(dict.fromkeys(handle.keys(), handle))
        return handles

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        """Names of the stored weights."""
        return list(self._handles)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of one weight."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one weight, or its rows [start, stop), from the memory map."""
        handle = self._handles[name]
        if start == 0 and stop in (None, self.shape_of(name)[0]):
            whole: Tensor = handle.get_tensor(name)
            return whole
        part: Tensor = handle.get_slice(name)[start:stop]
        return part

    def save_config(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, which names `dtype`, and copy generation_config.json."""
        super().save_config(folder, dtype)
        if (self.path / GENERATION).is_file():
            shutil.copyfile(self.path / GENERATION, folder / GENERATION)

    def pretrained_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `from_pretrained` of transformers' class loads this."""
        return {"pretrained_model_name_or_path": self.path, "use_safetensors": True}


def open_tensors(file: Path) -> safe_open:
    """Open a safetensors file; XinslmError if it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise XinslmError(
            f"{file} is not a complete safetensors file ({error}); copy or create it again"
        ) from None


def write_config(settings: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write config.json, and the special tokens of generation into generation_config.json."""
    kept = {key: value for key, value in settings.items() if key != "torch_dtype"}
    write_json(folder / CONFIG, {**kept, "dtype": str(dtype).removeprefix("torch.")})
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {role: settings[role] for role in roles if settings.get(role) is not None}
    write_json(folder / GENERATION, tokens)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight of a model of this shape."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
