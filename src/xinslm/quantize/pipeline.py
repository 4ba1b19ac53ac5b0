"""Quantize one model with one layer in memory at a time.

Within a layer the order is q, k, v -> o -> gate, up -> down; each step is fitted to inputs that the
earlier steps' codes produce. Linear layers get Q4_0 codes by GPTQ; the embedding (and an untied LM
head) gets Q8_0, because a 4-bit table would cost as much quality as all linear layers. Weights that
no grid can hold stay at 16 bits, with a note.

A finished layer lies in a file of its own (`finished_layers.py`), so a stopped run continues after
it with the activations that it left on the disk (`activations.py`). If those are damaged, the rows
pass through the finished layers again.
"""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from xinslm.data.packing import Batch
from xinslm.errors import XinslmError
from xinslm.model.files import open_model
from xinslm.model.grids import (
    BLOCK,
    Q4_0,
    Q8_0,
    decode,
    encode,
    fit_scales,
    pack_nibbles,
)
from xinslm.model.names import QUANTIZED_WEIGHTS
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import FolderSource, ModelSource, weight_shapes
from xinslm.progress import Listener, Progress, ignore
from xinslm.quantize.activations import Blocks, Calibration, load_blocks, needs_original
from xinslm.quantize.calibration import hash_rows
from xinslm.quantize.finished_layers import FinishedLayers, Found, Layer
from xinslm.quantize.gptq import (
    DRIFT_TOKENS,
    Factor,
    factorise,
    place_largest,
    quantize_weights,
    round_to_nearest,
)
from xinslm.quantize.weights import Facts, WeightWriter

LINEARS = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
}
"""The linears of each half of a block in quantization order; a group reads the same inputs."""
_TABLE_ROWS = 8192


class Quantization:
    """One run: reads weights from `source`, quantizes them, writes `quantized.safetensors`.

    `batches` are the calibration rows; without any, weights are rounded to nearest, straight into
    the file. `method` is gptq, gptaq, which runs the original model along if there are tokens
    enough, rtn or absmax. `finished` has the layers of a stopped run and gets those of this one;
    without it, calibrated ones are kept in a temporary folder.
    """

    def __init__(
        self,
        source: ModelSource,
        bits: int,
        batches: list[Batch],
        on_progress: Listener = ignore,
        method: str = "gptq",
        finished: FinishedLayers | None = None,
    ) -> None:
        self.model, self.source, self.on_progress = source.config, source, on_progress
        self.grid = Q4_0 if bits == 4 else Q8_0
        self.batches, self.method = batches, method
        source.require()
        self.shapes = weight_shapes(self.model)
        source.require_weights(self.shapes)
        self._facts, self._finished = Facts(), finished
        self._calibration: Calibration | None = None
        self._first = source
        """The source as it was given, which has the stamps of the files."""

    @cached_property
    def found(self) -> Found:
        """What a stopped run has left; the files are read once."""
        if self._finished is None:
            return Found({}, [], [])
        return self._finished.find(self.model.num_hidden_layers, self._rows_hash)

    @cached_property
    def _rows_hash(self) -> str:
        return hash_rows(self.batches) if self.batches else ""

    @property
    def bits(self) -> int:
        """Bits of the linear layers."""
        return 4 if self.grid is Q4_0 else 8

    @property
    def formats(self) -> dict[str, str]:
        """Format by weight name without '.weight'."""
        return self._facts.formats

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Method and layer losses of each calibrated linear."""
        return self._facts.losses

    @property
    def notes(self) -> list[str]:
        """Deviations from the request, one sentence per reason with the weights it concerns."""
        return self._facts.notes

    def write(self, folder: Path) -> None:
        """Quantize everything into the folder's safetensors file.

        XinslmError if a file of the model is replaced meanwhile.
        """
        if self._finished is not None or not self.batches:
            self._write(folder, self._finished)
            return
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            self._write(folder, FinishedLayers(Path(temporary)))

    @torch.no_grad()
    def _write(self, folder: Path, finished: FinishedLayers | None) -> None:
        count = self.model.num_hidden_layers
        self._facts = Facts()
        self._reopen()
        if self.batches:
            assert finished is not None, "activations need a folder"
            with_original = needs_original(self.method, self.model, self.batches)
            self._calibration = Calibration(
                self.model, self.batches, finished.folder, with_original
            )
        with SafetensorsWriter(folder / QUANTIZED_WEIGHTS, self._tensor_names("")) as file:
            out = WeightWriter(file)
            self._table("model.embed_tokens.weight", out)
            self._facts.merge(out.facts)
            if finished is None:
                self._round_layers(count, file)
            else:
                for index, layer in enumerate(self._layers(count, finished)):
                    for name, tensor in finished.tensors(index, layer):
                        file.add(name, tensor)
                    self._facts.merge(layer.facts)
            out = WeightWriter(file)
            norm = "model.norm.weight"
            out.plain(norm, self.source.rows(norm, self.shapes[norm]))
            if not self.model.tie_word_embeddings:
                self._table("lm_head.weight", out)
            self._facts.merge(out.facts)
        self._first.require_unchanged()
        self.on_progress(Progress("quantize", count, count, "layers"))

    def _round_layers(self, count: int, file: SafetensorsWriter) -> None:
        """Write every layer without calibration, which takes no longer than keeping it would."""
        for index in range(count):
            self.on_progress(Progress("quantize", index, count, "layers"))
            out = WeightWriter(file)
            self._layer(index, out)
            self._facts.merge(out.facts)

    def _layers(self, count: int, finished: FinishedLayers) -> list[Layer]:
        """Every layer, computed unless a stopped run has finished it."""
        if note := self.found.describe(count):
            self.on_progress(Progress("quantize", note=note))
        layers: list[Layer] = []
        for index in range(count):
            self.on_progress(Progress("quantize", index, count, "layers"))
            previous = layers[-1].sha256 if layers else ""
            layer = self.found.layers.get(index)
            if layer is None or layer.previous != previous:
                self._bring_states(index, layers, finished)
                layer = self._compute(index, previous, finished)
            layers.append(layer)
        return layers

    def _bring_states(self, index: int, before: list[Layer], finished: FinishedLayers) -> None:
        """Bring the calibration rows to the inputs of a layer, for which those `before` are
        finished.
        """
        calibration = self._calibration
        if calibration is None or calibration.layer == index:
            return
        if before and calibration.resume(index, before[-1].states):
            return
        if calibration.layer is None:
            self._begin_states(calibration)
        for passed in range(cast(int, calibration.layer), index):
            note = f"computing the activations after layer {passed} again"
            self.on_progress(Progress("quantize", note=note))
            blocks = self._blocks(passed)
            for name, weight in finished.weights(passed, before[passed]):
                linear = blocks.quantized.get_submodule(name.removeprefix(self._prefix(passed)))
                linear.weight = nn.Parameter(weight)
            for part, groups in LINEARS.items():
                calibration.advance(blocks, part, groups[-1][-1])
            calibration.finish_layer()
            calibration.forget_before(passed + 1)

    def _begin_states(self, calibration: Calibration) -> None:
        """Write the rows' embeddings: those of the stored table, and for GPTAQ those before."""
        calibration.begin()
        name = "model.embed_tokens.weight"
        kind = self.formats[name.removesuffix(".weight")]
        for start, stop in self._parts(name):
            rows = self.source.rows(name, self.shapes[name], start, stop)
            if kind == Q8_0.name:
                scales = fit_scales(rows, Q8_0)
                stored = decode(encode(rows, scales, Q8_0), scales)
            else:
                stored = rows.half().float() if kind == "f16" else rows
            for stream, table in zip(calibration.streams, (stored, rows), strict=False):
                for index, batch in enumerate(self.batches):
                    ids = torch.from_numpy(batch.input_ids)
                    inside = (ids >= start) & (ids < stop)
                    state = (
                        stream.states.read(index) if start else torch.zeros(*ids.shape, len(rows.T))
                    )
                    state[inside] = table[ids[inside] - start]
                    stream.states.write(index, state)

    def _blocks(self, index: int) -> Blocks:
        self._reopen()
        return load_blocks(self.source, self.shapes, index)

    def _reopen(self) -> None:
        """Map the source's files anew: pages that were read of a map count as memory in use.

        XinslmError if they are other files by now.
        """
        self._first.require_unchanged()
        if isinstance(self.source, FolderSource):
            self.source = open_model(self.source.path)

    def _compute(self, index: int, previous: str, finished: FinishedLayers) -> Layer:
        """Quantize one block, and pass the calibration rows through it."""
        with finished.write(index, self._tensor_names(self._prefix(index))) as out:
            self._layer(index, out)
        if self._calibration is not None and not self._calibration.is_finite:
            raise self._broken(f"the outputs of layer {index} are NaN or infinite")
        self._first.require_unchanged()
        states = {} if self._calibration is None else self._calibration.finish_layer()
        layer = finished.finish(index, out, previous, self._rows_hash, states)
        if self._calibration is not None:
            self._calibration.forget_before(index + 1)
        return layer

    def _layer(self, index: int, out: WeightWriter) -> None:
        """Quantize the weights of one block into `out`, and advance the states through it."""
        blocks, prefix = self._blocks(index), self._prefix(index)
        for name, weight in blocks.original.state_dict().items():
            if weight.dim() == 1:
                out.plain(prefix + name, weight)
        for part, groups in LINEARS.items():
            half = blocks.quantized.get_submodule(part)
            for group in groups:
                names = [f"{prefix}{part}.{stem}" for stem in group]
                linears = [cast(nn.Linear, half.get_submodule(stem)) for stem in group]
                factor = None
                if linears[0].in_features % BLOCK == 0:
                    factor = self._factor(blocks, part, group[0], names[0], out.facts)
                self._linears(names, linears, factor, out)
            if self._calibration is not None:
                self._calibration.advance(blocks, part, groups[-1][-1])

    def _factor(
        self, blocks: Blocks, part: str, stem: str, name: str, facts: Facts
    ) -> Factor | None:
        """Factorize the Hessian of a linear's inputs; None without calibration."""
        if self._calibration is None:
            return None
        is_last = stem == LINEARS[part][-1][-1]
        hessian = self._calibration.hessian(blocks, part, stem, is_last)
        if self.method == "gptaq" and not hessian.knows_drift:
            facts.note(
                name,
                f"{hessian.tokens:,} calibration tokens for {hessian.columns:,} columns are too "
                f"few for GPTAQ (at least {DRIFT_TOKENS} each): GPTQ was used",
            )
        if not hessian.is_finite:
            raise self._broken(
                f"the inputs of {name} are NaN, infinite or too large to square in float32"
            )
        # no name for either here, which would keep them from being freed
        factor = factorise(hessian.mean(), hessian.drift())
        if factor is None:
            facts.note(name, "no damping makes its inputs' Hessian invertible, rounded to nearest")
        return factor

    def _broken(self, what: str) -> XinslmError:
        return XinslmError(
            f"{self.source.path}: on the calibration text, {what}. The model is broken there or in "
            "an earlier layer, or needs other text; --method rtn rounds without text"
        )

    def _linears(
        self,
        names: list[str],
        linears: list[nn.Linear],
        factor: Factor | None,
        out: WeightWriter,
    ) -> None:
        """Quantize and write linears that read the same inputs; load the dequantized results."""
        coded: dict[str, nn.Linear] = {}
        for name, linear in zip(names, linears, strict=True):
            if out.fits(name, linear.weight.data, self.grid):
                coded[name] = linear
            else:
                linear.weight = nn.Parameter(out.half(f"{name}.weight", linear.weight.data))
        weights = [linear.weight.data for linear in coded.values()]
        if self.method == "absmax" and self.grid is Q4_0:
            results = [place_largest(weight) for weight in weights]
        elif self.grid is Q4_0:
            results = quantize_weights(weights, factor)
        else:
            results = [round_to_nearest(weight, self.grid) for weight in weights]
        for (name, linear), result in zip(coded.items(), results, strict=True):
            if factor is not None:
                out.facts.losses[name] = {
                    "method": result.method,
                    "loss": result.loss,
                    "rtn_loss": result.rtn_loss,
                }
                if result.method == "rtn":
                    out.facts.note(name, "GPTQ did not beat rounding to nearest, which was kept")
            codes = pack_nibbles(result.codes) if self.grid is Q4_0 else result.codes
            out.coded(name, self.grid, codes, result.scales)
            linear.weight = nn.Parameter(decode(result.codes, result.scales))

    def _table(self, name: str, out: WeightWriter) -> None:
        """Write the embedding or LM head at 8 bits, in blocks of rows."""
        shape, stem = self.shapes[name], name.removesuffix(".weight")
        parts = self._parts(name)
        if not all(out.fits(stem, self.source.rows(name, shape, *part), Q8_0) for part in parts):
            out.half(name, self.source.rows(name, shape))
            return
        codes, scales = (
            torch.empty(shape, dtype=torch.int8),
            torch.empty(shape[0], shape[1] // BLOCK),
        )
        for start, stop in parts:
            weight = self.source.rows(name, shape, start, stop)
            scales[start:stop] = fit_scales(weight, Q8_0)
            codes[start:stop] = encode(weight, scales[start:stop], Q8_0)
        out.coded(stem, Q8_0, codes, scales)

    def _parts(self, name: str) -> list[tuple[int, int]]:
        """Ranges of rows in which a table is read."""
        count = self.shapes[name][0]
        return [(i, min(i + _TABLE_ROWS, count)) for i in range(0, count, _TABLE_ROWS)]

    def _prefix(self, index: int) -> str:
        return f"model.layers.{index}."

    def _tensor_names(self, prefix: str) -> list[str]:
        """Names of tensors that weights with this prefix may get, for the file's header."""
        stems = [n.removesuffix("weight") for n in self.shapes if n.startswith(prefix)]
        return [stem + end for stem in stems for end in ("codes", "scales")]
