"""Quantize one model with one layer in memory at a time.

Within a layer the order is q, k, v -> o -> gate, up -> down; each step is fitted to inputs that the
earlier steps' codes produce. Linear layers get Q4_0 codes by GPTQ; the embedding (and an untied LM
head) gets Q8_0, because a 4-bit table would cost as much quality as all linear layers. Weights that
no grid can hold stay at 16 bits, with a note.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xinslm.data.packing import Batch
from xinslm.model.grids import (
    BLOCK,
    Q4_0,
    Q8_0,
    Grid,
    check_range,
    decode,
    encode,
    fit_scales,
    pack_nibbles,
)
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import QUANTIZED_WEIGHTS, ModelSource, weight_shapes
from xinslm.model.transformer import Block
from xinslm.progress import Listener, Progress, ignore
from xinslm.quantize.calibration import Blocks, Calibration
from xinslm.quantize.gptq import (
    DRIFT_TOKENS,
    Factor,
    factorise,
    place_largest,
    quantize_weights,
    round_to_nearest,
)

LINEARS = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
}
"""The linears of each half of a block in quantization order; a group reads the same inputs."""
_TABLE_ROWS = 8192


class Quantization:
    """One run: reads weights from `source`, quantizes them, writes `quantized.safetensors`.

    `batches` are the calibration rows; without any, weights are rounded to nearest.
    `method` is gptq, gptaq, which runs the original model along, rtn or absmax.
    """

    def __init__(
        self,
        source: ModelSource,
        bits: int,
        batches: list[Batch],
        on_progress: Listener = ignore,
        method: str = "gptq",
    ) -> None:
        self.model, self.source, self.on_progress = source.config, source, on_progress
        self.grid = Q4_0 if bits == 4 else Q8_0
        self.batches, self.method = batches, method
        source.require()
        self.shapes = weight_shapes(self.model)
        self.formats: dict[str, str] = {}
        """Format by weight name without '.weight'."""
        self.losses: dict[str, dict[str, Any]] = {}
        """Method and layer losses of each calibrated linear."""
        self._noted: dict[str, list[str]] = {}
        self._calibration: Calibration | None = None

    @property
    def bits(self) -> int:
        """Bits of the linear layers."""
        return 4 if self.grid is Q4_0 else 8

    @property
    def notes(self) -> list[str]:
        """Deviations from the request, one sentence per reason with the weights it concerns."""
        return [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
            for reason, names in self._noted.items()
        ]

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Quantize everything into the folder's safetensors file."""
        layers = self.model.num_hidden_layers
        stems = [name.removesuffix("weight") for name in self.shapes]
        names = [stem + end for stem in stems for end in ("codes", "scales")]
        with SafetensorsWriter(folder / QUANTIZED_WEIGHTS, names) as self._out:
            look_up = self._table("model.embed_tokens.weight")
            if self.batches:
                states = [look_up(torch.from_numpy(batch.input_ids)) for batch in self.batches]
                originals = self._originals(states) if self.method == "gptaq" else None
                self._calibration = Calibration(self.model, self.batches, states, originals)
            for layer in range(layers):
                self.on_progress(Progress("quantize", layer, layers, "layers"))
                self._layer(layer)
            self._plain(
                "model.norm.weight",
                self.source.rows("model.norm.weight", self.shapes["model.norm.weight"]),
            )
            if not self.model.tie_word_embeddings:
                self._table("lm_head.weight")
        self.on_progress(Progress("quantize", layers, layers, "layers"))

    def _layer(self, index: int) -> None:
        """Quantize one block, and pass the calibration rows through it."""
        prefix = f"model.layers.{index}."
        names = [name for name in self.shapes if name.startswith(prefix)]
        with torch.device("meta"):
            blocks = Blocks(Block(self.model, index), Block(self.model, index))
        weights = {
            name.removeprefix(prefix): self.source.rows(name, self.shapes[name]) for name in names
        }
        for block in (blocks.quantized, blocks.original):  # the same tensors, until one is replaced
            block.load_state_dict(weights, assign=True)
        for name, weight in weights.items():
            if weight.dim() == 1:  # norms and biases
                self._plain(f"{prefix}{name}", weight)
        for part, groups in LINEARS.items():
            half = blocks.quantized.get_submodule(part)
            for group in groups:
                linears = [cast(nn.Linear, half.get_submodule(stem)) for stem in group]
                factor = None
                if linears[0].in_features % BLOCK == 0:
                    factor = self._factor(blocks, part, group[0], prefix)
                self._linears([f"{prefix}{part}.{stem}" for stem in group], linears, factor)
            if self._calibration is not None:
                self._calibration.advance(blocks, part, groups[-1][-1])

    def _factor(self, blocks: Blocks, part: str, stem: str, prefix: str) -> Factor | None:
        """Factorize the Hessian of a linear's inputs; None without calibration."""
        if self._calibration is None:
            return None
        hessian = self._calibration.hessian(blocks, part, stem)
        drift = hessian.drift()
        if self.method == "gptaq" and drift is None:
            self._note(
                f"{prefix}{part}.{stem}",
                f"{hessian.tokens:,} calibration tokens for {len(hessian.sum):,} columns are too "
                f"few for GPTAQ (at least {DRIFT_TOKENS} each): GPTQ was used",
            )
        factor = factorise(hessian.mean(), drift)
        if factor is None:
            self._note(
                f"{prefix}{part}.{stem}",
                "no damping makes its inputs' Hessian invertible, rounded to nearest",
            )
        return factor

    def _linears(self, names: list[str], linears: list[nn.Linear], factor: Factor | None) -> None:
        """Quantize and write linears that read the same inputs; load the dequantized results."""
        coded: dict[str, nn.Linear] = {}
        for name, linear in zip(names, linears, strict=True):
            if self._fits(name, linear.weight.data, self.grid):
                coded[name] = linear
            else:
                linear.weight = nn.Parameter(self._half(f"{name}.weight", linear.weight.data))
        weights = [linear.weight.data for linear in coded.values()]
        if self.method == "absmax" and self.grid is Q4_0:
            results = [place_largest(weight) for weight in weights]
        elif self.grid is Q4_0:
            results = quantize_weights(weights, factor)
        else:
            results = [round_to_nearest(weight, self.grid) for weight in weights]
        for (name, linear), result in zip(coded.items(), results, strict=True):
            if factor is not None:
                self.losses[name] = {
                    "method": result.method,
                    "loss": result.loss,
                    "rtn_loss": result.rtn_loss,
                }
                if result.method == "rtn":
                    self._note(name, "GPTQ did not beat rounding to nearest, which was kept")
            codes = pack_nibbles(result.codes) if self.grid is Q4_0 else result.codes
            self._coded(name, self.grid, codes, result.scales)
            linear.weight = nn.Parameter(decode(result.codes, result.scales))

    def _table(self, name: str) -> Callable[[Tensor], Tensor]:
        """Write the embedding or LM head at 8 bits in blocks of rows; return a lookup of the stored
        table.
        """
        shape, stem = self.shapes[name], name.removesuffix(".weight")
        parts = self._parts(name)
        if not all(self._fits(stem, self.source.rows(name, shape, *part), Q8_0) for part in parts):
            kept = self._half(name, self.source.rows(name, shape))
            return lambda ids: kept[ids]
        codes, scales = (
            torch.empty(shape, dtype=torch.int8),
            torch.empty(shape[0], shape[1] // BLOCK),
        )
        for start, stop in parts:
            weight = self.source.rows(name, shape, start, stop)
            scales[start:stop] = fit_scales(weight, Q8_0)
            codes[start:stop] = encode(weight, scales[start:stop], Q8_0)
        self._coded(stem, Q8_0, codes, scales)
        return lambda ids: decode(codes[ids].flatten(0, -2), scales[ids].flatten(0, -2)).view(
            *ids.shape, -1
        )

    def _originals(self, states: list[Tensor]) -> list[Tensor]:
        """The batches' embeddings before quantization, shaped as `states`."""
        name = "model.embed_tokens.weight"
        originals = [torch.empty_like(state) for state in states]
        ids = [torch.from_numpy(batch.input_ids) for batch in self.batches]
        for start, stop in self._parts(name):
            rows = self.source.rows(name, self.shapes[name], start, stop)
            for chosen, state in zip(ids, originals, strict=True):
                inside = (chosen >= start) & (chosen < stop)
                state[inside] = rows[chosen[inside] - start]
        return originals

    def _parts(self, name: str) -> list[tuple[int, int]]:
        """Ranges of rows in which a table is read."""
        count = self.shapes[name][0]
        return [(i, min(i + _TABLE_ROWS, count)) for i in range(0, count, _TABLE_ROWS)]

    def _fits(self, name: str, weight: Tensor, grid: Grid) -> bool:
        """Whether a matrix fits this grid; if not, a note says why."""
        if weight.shape[1] % BLOCK:
            self._note(
                name, f"rows of {weight.shape[1]} are no multiple of {BLOCK}, kept at 16 bits"
            )
            return False
        report = check_range(weight, grid)
        if not report.fits:
            self._note(name, "magnitudes that float16 scales cannot hold, kept unquantized")
        elif report.small_blocks:
            self._note(name, "some blocks are too small for a fine float16 scale")
        return report.fits

    def _coded(self, name: str, grid: Grid, codes: Tensor, scales: Tensor) -> None:
        self.formats[name] = grid.name
        self._out.add(f"{name}.codes", codes)
        self._out.add(f"{name}.scales", scales.half())

    def _plain(self, name: str, weight: Tensor) -> None:
        self.formats[name.removesuffix(".weight")] = "f32"
        self._out.add(name, weight)

    def _half(self, name: str, weight: Tensor) -> Tensor:
        """Write a weight in float16, or in float32 if float16 loses precision; return the stored
        values.
        """
        half = weight.half()
        lost = (half.float() - weight).double().square().sum()
        if not torch.isfinite(half).all() or lost > 1e-6 * weight.double().square().sum():
            self._plain(name, weight)
            return weight
        self.formats[name.removesuffix(".weight")] = "f16"
        self._out.add(name, half)
        return half.float()

    def _note(self, name: str, reason: str) -> None:
        names = self._noted.setdefault(reason, [])
        if name not in names:
            names.append(name)
