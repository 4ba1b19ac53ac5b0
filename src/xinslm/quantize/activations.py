"""Activations of the calibration rows, in files, layer by layer.

Rows pass through layers that are already quantized, so that each layer is fitted to its actual
inputs (GPTQ's "true sequential" order). Padding never enters a Hessian, and documents do not attend
to each other. The residual streams of all rows, 0.4 GB for 65,536 tokens of a model 1,536 wide, and
the inputs of the linear that is quantized next, four times that, lie in files that are read a batch
at a time: memory holds one batch, and what the system caches it can take back.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xinslm.data.packing import Batch
from xinslm.files import sha256_file
from xinslm.model.config import ModelConfig
from xinslm.model.finite import all_finite
from xinslm.model.source import ModelSource
from xinslm.model.transformer import Block, Transformer
from xinslm.quantize.gptq import Hessian, suffice_for_drift

_STREAMS = ("quantized", "original")


@dataclass(frozen=True)
class Blocks:
    """One block twice: with the weights that are quantized so far, and as it was."""

    quantized: Block
    original: Block


def load_blocks(source: ModelSource, shapes: Mapping[str, tuple[int, ...]], index: int) -> Blocks:
    """One layer twice, with the same float32 tensors, until one is replaced."""
    prefix = f"model.layers.{index}."
    with torch.device("meta"):
        blocks = Blocks(Block(source.config, index), Block(source.config, index))
    weights = {
        name.removeprefix(prefix): source.rows(name, shape)
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
    for block in (blocks.quantized, blocks.original):
        block.load_state_dict(weights, assign=True)
    return blocks


def working_bytes(config: ModelConfig, batches: list[Batch], with_original: bool) -> int:
    """Size of all files of a `Calibration`: each stream twice, and the widest linear's inputs."""
    tokens = sum(batch.input_ids.size for batch in batches)
    streams = 2 * (2 if with_original else 1)
    return 4 * tokens * (streams * config.hidden_size + max(_inputs_of_linears(config)))


def _inputs_of_linears(config: ModelConfig) -> tuple[int, int, int]:
    heads = config.num_attention_heads * config.head_dim
    return config.hidden_size, config.intermediate_size, heads


def needs_original(method: str, config: ModelConfig, batches: list[Batch]) -> bool:
    """Whether the original model has to run along: for GPTAQ, if there are tokens enough for it in
    any linear.
    """
    fewest = min(_inputs_of_linears(config))
    return method == "gptaq" and suffice_for_drift(_number_of_tokens(batches), fewest)


def _number_of_tokens(batches: list[Batch]) -> int:
    return sum(int((batch.segments >= 0).sum()) for batch in batches)


class Calibration:
    """All calibration rows, advanced layer by layer through the quantized model and, for GPTAQ,
    through the original one as well.
    """

    def __init__(
        self, config: ModelConfig, batches: list[Batch], folder: Path, with_original: bool
    ) -> None:
        """`folder` gets the files; the states come from `begin` or `resume`."""
        self._batches, self._folder = batches, folder
        names = _STREAMS if with_original else _STREAMS[:1]
        self._streams = {name: _Stream(config, batches, folder, name) for name in names}
        self._quantized = self._streams["quantized"]
        self._original = self._streams.get("original")
        self._kept: BatchFile | None = None
        self.layer: int | None = None
        """Index of the layer whose inputs the states are; None before `begin` or `resume`."""

    @property
    def streams(self) -> list["_Stream"]:
        """The streams, whose `states` take the embeddings: that of the quantized model first."""
        return list(self._streams.values())

    @property
    def is_finite(self) -> bool:
        """Whether no output that was added to the states was NaN or infinite."""
        return all(stream.is_finite for stream in self.streams)

    def begin(self) -> None:
        """Start from layer 0, with states that are written by the caller."""
        for stream in self.streams:
            stream.begin()
        self.layer = 0

    def resume(self, layer: int, hashes: dict[str, str]) -> bool:
        """Take up the states that `finish_layer` left before a layer; false if one is missing or
        does not have its hash.
        """
        sound = self._streams.keys() <= hashes.keys() and all(
            stream.has(layer, hashes[name]) for name, stream in self._streams.items()
        )
        if sound:
            for stream in self.streams:
                stream.resume(layer)
            self.layer = layer
        return sound

    def hessian(self, blocks: Blocks, part: str, stem: str, is_last: bool) -> Hessian:
        """Run the rows through half `part` of the block up to linear `stem`; return X^T X of its
        inputs, with their drift if the original model runs along and there are tokens enough, and
        for the last linear that of the residual stream.

        If the linear is the last of the half, its inputs are kept for `advance`, and the original
        model, whose weights do not change, advances at once.
        """
        linear = cast(nn.Linear, blocks.quantized.get_submodule(f"{part}.{stem}"))
        hessian = Hessian(linear.in_features)
        with_drift = suffice_for_drift(_number_of_tokens(self._batches), linear.in_features)
        kept = None
        if is_last:
            shapes = [(*batch.input_ids.shape, linear.in_features) for batch in self._batches]
            kept = BatchFile(self._folder / "inputs", shapes)
        for index, batch in enumerate(self._batches):
            inputs = self._quantized.inputs(blocks.quantized, part, stem, index)
            if kept is not None:
                kept.write(index, inputs)
            written = torch.from_numpy(batch.segments >= 0)
            rows = inputs.flatten(0, 1) if written.all() else inputs[written]
            hessian.add(rows)
            if self._original is not None and (with_drift or is_last):
                originals = self._original.inputs(blocks.original, part, stem, index)
                if with_drift:
                    hessian.add_drift(originals[written] - rows, rows)
                if is_last:
                    if with_drift:
                        lost = self._original.states.read(index)
                        lost -= self._quantized.states.read(index)
                        hessian.add_stream_drift(lost[written], rows)
                    original = blocks.original.get_submodule(f"{part}.{stem}")
                    self._original.add(index, original(originals))
        self._kept = kept
        return hessian

    def advance(self, blocks: Blocks, part: str, stem: str) -> None:
        """Add the output of half `part` of the block to the states; `stem` is its last linear."""
        pairs = list(zip(self.streams, (blocks.quantized, blocks.original), strict=False))
        for stream, block in pairs[:1] if self._kept is not None else pairs:
            linear = block.get_submodule(f"{part}.{stem}")
            for index in range(len(self._batches)):
                if self._kept is not None:
                    inputs = self._kept.read(index)
                else:
                    inputs = stream.inputs(block, part, stem, index)
                stream.add(index, linear(inputs))
        self._kept = None
        for stream in self.streams:
            stream.turn()

    def finish_layer(self) -> dict[str, str]:
        """Name the files of the states for the next layer; return their hashes by stream."""
        assert self.layer is not None, "begin or resume comes first"
        self.layer += 1
        return {name: stream.finish(self.layer) for name, stream in self._streams.items()}

    def forget_before(self, layer: int) -> None:
        """Delete the states of earlier layers, once `layer` can be resumed."""
        for stream in self.streams:
            stream.forget_before(layer)


class BatchFile:
    """A file of one float32 tensor for each batch, read and written a batch at a time."""

    def __init__(self, path: Path, shapes: list[tuple[int, ...]]) -> None:
        self.path, self._shapes = path, shapes
        self._places, place = [], 0
        for shape in shapes:
            self._places.append(place)
            place += 4 * torch.Size(shape).numel()

    def read(self, index: int) -> Tensor:
        """Read one batch's tensor."""
        tensor = torch.empty(self._shapes[index])
        view = memoryview(cast(Any, tensor.numpy())).cast("B")
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._places[index])
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                assert count, f"{self.path} ends early"
                done += count
        return tensor

    def write(self, index: int, tensor: Tensor) -> memoryview:
        """Write one batch's tensor; return its bytes."""
        assert tuple(tensor.shape) == self._shapes[index], "the shape is the batch's"
        view = memoryview(cast(Any, tensor.contiguous().numpy())).cast("B")
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        with open(handle, "wb", buffering=0) as file:
            file.seek(self._places[index])
            done = 0
            while done < len(view):
                done += file.write(view[done:])
        return view


class _Captured(Exception):
    """Ends a forward pass after the required inputs were captured."""


class _Stream:
    """Residual-stream states of all rows in one model."""

    def __init__(self, config: ModelConfig, batches: list[Batch], folder: Path, name: str) -> None:
        with torch.device("meta"):
            self._model = Transformer(config)  # only its rotary tables and masks are used
        self._batches, self._folder, self._name = batches, folder, name
        self._shapes = [(*batch.input_ids.shape, config.hidden_size) for batch in batches]
        self._next = self._file("next")
        self._hash, self._digest = hashlib.sha256(), ""
        self.is_finite = True
        """Whether all states that `add` has made are finite, without padding."""
        self.states = self._file("0")
        """The states at the beginning of the present half of a layer."""

    def _file(self, which: str) -> BatchFile:
        return BatchFile(self._folder / f"{self._name}-states-{which}", self._shapes)

    def begin(self) -> None:
        """Start from states that are written into `states`."""
        self.states = self._file("0")

    def has(self, layer: int, sha256: str) -> bool:
        """Whether the states before a layer are there, and have this hash."""
        path = self._file(str(layer)).path
        return path.is_file() and sha256_file(path) == sha256

    def resume(self, layer: int) -> None:
        """Take up the states before a layer."""
        self.states = self._file(str(layer))
        self._hash = hashlib.sha256()

    def add(self, index: int, outputs: Tensor) -> None:
        """Add one batch's outputs of a half; batches come in order."""
        states = self.states.read(index).add_(outputs)
        written = torch.from_numpy(self._batches[index].segments >= 0)
        self.is_finite = self.is_finite and all_finite(states[written])
        self._hash.update(self._next.write(index, states))

    def turn(self) -> None:
        """Go on with the states that all `add` have made."""
        self.states, self._digest = self._next, self._hash.hexdigest()
        self._hash = hashlib.sha256()

    def finish(self, layer: int) -> str:
        """Name the states after that of the layer that they go into; return their hash."""
        named = self._file(str(layer))
        os.replace(self.states.path, named.path)
        self.states = named
        return self._digest

    def forget_before(self, layer: int) -> None:
        """Delete the states of earlier layers."""
        for path in self._folder.glob(f"{self._name}-states-*"):
            number = path.name.rpartition("-")[2]
            if number.isdigit() and int(number) < layer:
                path.unlink()

    def inputs(self, block: Block, part: str, stem: str, index: int) -> Tensor:
        """Inputs of linear `stem` in half `part` of `block` for one batch."""
        half, linear = block.get_submodule(part), block.get_submodule(f"{part}.{stem}")
        captured: list[Tensor] = []

        def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured.append(inputs[0])
            raise _Captured

        handle = linear.register_forward_pre_hook(capture)
        try:
            with contextlib.suppress(_Captured):
                self._run(block, half, self._batches[index], self.states.read(index))
        finally:
            handle.remove()
        return captured[0]

    def _run(self, block: Block, half: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """Output of one half of `Block.forward`; with halves, nothing is computed twice."""
        if half is block.mlp:
            return block.mlp(block.post_attention_layernorm(states))
        positions, segments = torch.from_numpy(batch.positions), torch.from_numpy(batch.segments)
        cos, sin = self._model.rotary(positions, states.dtype)
        mask = self._model.attended(segments, segments)
        return block.self_attn(block.input_layernorm(states), cos, sin, mask, None)
