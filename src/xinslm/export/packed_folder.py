"""`xinslm export hf` and `xinslm export mlx`: a model for transformers, vLLM or mlx-lm.

Codes and scales of a quantized folder, or of another model that has them, are transcribed; what has
none is written without quantization. Before the folder is put in place its weights are read back,
decoded by the format's definition, and compared with the quantized folder's; a single value that
differs is an error. Memory holds one tensor at a time.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xinslm.config import to_dict
from xinslm.errors import UsageError, XinslmError
from xinslm.export.card import Export, commands, write_card
from xinslm.export.config import FolderConfig, HfConfig, MlxConfig
from xinslm.export.kinds import EXPORT
from xinslm.export.layouts import CompressedTensors, Gptq, Layout, Mlx
from xinslm.export.packing import BITS, stored_weight
from xinslm.files import read_json, write_json, write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside
from xinslm.model.files import open_model
from xinslm.model.finite import all_finite
from xinslm.model.names import CONFIG, WEIGHTS
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import ModelSource, open_tensors, weight_shapes
from xinslm.model.stored import StoredWeight
from xinslm.progress import Listener, Progress, ignore
from xinslm.runs import add_file, require_run
from xinslm.tokenizer.base import Tokenizer, check_vocabulary
from xinslm.tokenizer.load import load_tokenizer
from xinslm.tokenizer.sample import SAMPLE

VERSION = 1


@dataclass(frozen=True)
class Result:
    """The folder that was written."""

    folder: Path
    runtimes: str
    types: dict[str, int]
    """Number of weights by how they are stored: '4-bit', '8-bit', or a type."""
    file_bytes: int
    weights: int
    rounded: int
    """Weights outside the codes that the chosen type does not hold exactly."""
    note: str = ""
    """What the runtimes do otherwise than the model."""

    def describe(self) -> str:
        """Lines for the terminal."""
        census = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        equal = f"all {self.weights:,} values equal the model's"
        if self.rounded:
            equal = (
                f"{self.rounded:,} of {self.weights:,} values rounded to the chosen type, all "
                "codes and scales equal"
            )
        return "\n".join(
            [
                f"tensors {census}",
                f"size    {self.file_bytes / 2**20:.2f} MiB",
                f"check   read back: {equal}",
                f"reads   {self.runtimes}",
                *([f"note    {self.note}"] if self.note else []),
                f"output  {self.folder}",
            ]
        )


def run_hf(config: HfConfig, on_progress: Listener = ignore) -> Result:
    """Write a quantized folder as transformers reads it."""
    layout = Gptq() if config.format == "gptq" else CompressedTensors()
    return _run(config, layout, on_progress)


def run_mlx(config: MlxConfig, on_progress: Listener = ignore) -> Result:
    """Write a quantized folder as mlx-lm reads it."""
    return _run(config, Mlx(), on_progress)


def _run(config: FolderConfig, layout: Layout, on_progress: Listener) -> Result:
    config.check()
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (config.model,))
    if config.run is not None:
        require_run(config.run)
    source = _Source(open_model(config.model), layout)
    if isinstance(layout, Mlx):
        _refuse_wide_heads(source)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(source.model.config.vocab_size, tokenizer, str(config.model))
    dtype = getattr(torch, config.dtype)
    with new_folder(config.output_dir, config.force) as folder:
        _write(source, dtype, folder, on_progress)
        tokenizer.save(folder)
        types, rounded = _compare(source, dtype, folder, on_progress)
        compare_tokenizers(tokenizer, folder)
        _write_card(source, types, folder, config.run, tokenizer.chat_template is not None)
        inputs, calibration = {"model": source.model.fingerprint}, source.model.calibration
        write_manifest(folder, EXPORT, VERSION, to_dict(config), inputs, calibration=calibration)
    result = Result(
        config.output_dir,
        layout.runtimes,
        types,
        (config.output_dir / WEIGHTS).stat().st_size,
        sum(map(math.prod, source.shapes.values())),
        rounded,
        _window_note(source) if isinstance(layout, Mlx) else "",
    )
    bits = 8 * result.file_bytes / result.weights
    add_file(config.run, config.output_dir, result.file_bytes, bits)
    return result


def _write_card(
    source: "_Source", types: dict[str, int], folder: Path, run: Path | None, has_chat: bool
) -> None:
    library = "mlx" if isinstance(source.layout, Mlx) else "transformers"
    method = source.settings.get("quantization_config", {}).get("quant_method")
    export = Export(
        source.model,
        library,
        WEIGHTS,
        (folder / WEIGHTS).stat().st_size,
        types,
        source.model.config.max_position_embeddings,
        commands(library, method, has_chat),
        run,
    )
    write_card(folder, export)


def _refuse_wide_heads(source: "_Source") -> None:
    """mlx-lm 0.32 computes the width of Qwen2's heads and does not read it."""
    shape = source.model.config
    if shape.model_type == "qwen2" and shape.hidden_size != shape.num_attention_heads * (
        shape.head_dim
    ):
        raise UsageError(
            f"{source.model.name} is a qwen2 with head_dim {shape.head_dim} and "
            f"{shape.num_attention_heads} heads on hidden_size {shape.hidden_size}; mlx-lm takes "
            "hidden_size / num_attention_heads for the width of its heads: use export gguf or hf"
        )


def _window_note(source: "_Source") -> str:
    """mlx-lm 0.32 takes a model whose layers all have a window for one without."""
    window = source.model.config.sliding_window
    if window is None or window >= source.model.config.max_position_embeddings:
        return ""
    return (
        f"mlx-lm ignores this model's sliding window of {window:,} tokens: its results are the "
        f"model's own up to {window:,} tokens, not beyond"
    )


class _Source:
    """Weights of a model, with codes where it has them and the layout has a place for them."""

    def __init__(self, model: ModelSource, layout: Layout) -> None:
        self.model, self.layout = model, layout
        model.require()
        self.shapes = weight_shapes(model.config)
        model.require_weights(self.shapes)
        matrices = [name for name, shape in self.shapes.items() if len(shape) == 2]
        kinds = {name.removesuffix(".weight"): self._stored(name).format for name in matrices}
        is_quantized = bool(set(kinds.values()) & BITS.keys())
        if not is_quantized and isinstance(layout, Gptq):
            raise UsageError(
                f"{model.name} is not quantized: run `xinslm quantize` first, or leave out --format"
            )
        self.settings = layout.settings(kinds) if is_quantized else {}

    def read(self, name: str) -> tuple[StoredWeight, bool]:
        """A weight, and whether its codes are kept."""
        weight = self._stored(name)
        return weight, self.layout.packs(name.removesuffix(".weight"), weight.format)

    def _stored(self, name: str) -> StoredWeight:
        return stored_weight(self.model, name, self.shapes[name])


def _write(source: _Source, dtype: torch.dtype, folder: Path, on_progress: Listener) -> None:
    names = list(source.shapes)
    with SafetensorsWriter(folder / WEIGHTS, [f"{n}_{i}" for n in names for i in range(4)]) as out:
        for done, name in enumerate(names):
            on_progress(Progress("export", done, len(names), "tensors"))
            weight, is_packed = source.read(name)
            if is_packed:
                stem = name.removesuffix(".weight")
                for key, tensor in source.layout.tensors(stem, weight, dtype).items():
                    out.add(key, tensor)
            else:
                out.add(name, _plain(weight.dequantize(), dtype, name))
    source.model.save_config(folder, dtype)
    # mlx-lm and older versions of transformers do not read `rope_parameters`
    shape = source.model.config.to_hf()
    rotation = {key: shape[key] for key in ("rope_theta", "rope_scaling", "head_dim")}
    write_json(folder / CONFIG, read_json(folder / CONFIG) | rotation | source.settings)


def _plain(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = values.to(dtype)
    if not all_finite(stored):
        raise UsageError(f"weight '{name}' has values beyond float16: use --dtype float32")
    return stored


def _compare(
    source: _Source, dtype: torch.dtype, folder: Path, on_progress: Listener
) -> tuple[dict[str, int], int]:
    """Read the folder back: weights by how they are stored, and values that `dtype` rounded.

    XinslmError if any other value differs.
    """
    file = open_tensors(folder / WEIGHTS)
    types: Counter[str] = Counter()
    rounded = 0
    for done, name in enumerate(source.shapes):
        on_progress(Progress("read back", done, len(source.shapes), "tensors"))
        weight, is_packed = source.read(name)
        expected = weight.dequantize()
        if is_packed:
            bits = BITS[weight.format]
            found = source.layout.decode(file.get_tensor, name.removesuffix(".weight"), bits)
            types[f"{bits}-bit"] += 1
        else:
            found = file.get_tensor(name).float()
            rounded += int((found != expected).sum())
            expected = expected.to(dtype).float()
            types[str(dtype).removeprefix("torch.")] += 1
        if not torch.equal(found, expected):
            count = int((found != expected).sum()) if found.shape == expected.shape else "all"
            raise XinslmError(f"{name}: {count} values differ after the export; nothing is written")
    count = len(source.shapes)
    on_progress(Progress("read back", count, count, "tensors"))
    return dict(types), rounded


def compare_tokenizers(tokenizer: Tokenizer, folder: Path) -> None:
    """XinslmError unless the copy in `folder` gives the same ids and has the same template."""
    copy = load_tokenizer(folder)
    same = list(copy.encode(SAMPLE)) == list(tokenizer.encode(SAMPLE))
    if not same or copy.chat_template != tokenizer.chat_template:
        raise XinslmError("the exported tokenizer differs from the model's; nothing is written")
