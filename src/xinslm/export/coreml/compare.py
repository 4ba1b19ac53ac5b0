"""Compares a package that was written with the model, weight by weight."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from xinslm.errors import XinslmError
from xinslm.export.coreml.package import PALETTIZED, QUANTIZED, Package
from xinslm.export.coreml.palettes import Palette
from xinslm.export.packing import BITS, codes, stored_weight
from xinslm.model.source import ModelSource
from xinslm.model.stored import StoredWeight
from xinslm.progress import Listener, Progress

_OPERATIONS = {QUANTIZED: "-bit", PALETTIZED: "-bit palette"}
"""How kinds of weights end that are made by an operation."""


def compare(
    source: ModelSource,
    shapes: Mapping[str, tuple[int, ...]],
    palettes: Mapping[str, Palette],
    package: Package,
    on_progress: Listener,
) -> tuple[dict[str, int], int]:
    """Number of weights by how they are stored, and of values that float16 rounded.

    XinslmError if a code, a scale, an index, a number of a table or a rounded value is not the
    model's or the palette's, or if the program has others.
    """
    types: Counter[str] = Counter()
    rounded = 0
    for done, (name, shape) in enumerate(shapes.items()):
        on_progress(Progress("read back", done, len(shapes), "tensors"))
        if name in palettes:
            types[_compare_palette(name, palettes[name], package)] += 1
            continue
        weight = stored_weight(source, name, shape)
        if weight.format in BITS:
            types[_compare_codes(name, weight, package)] += 1
            continue
        values = weight.dequantize()
        half = values.half()
        rounded += int((half.float() != values).sum())
        found = package.plain(name)
        if found is None and bool((half == 1).all()):
            found = half.numpy()  # coremltools leaves out a product with ones
        if found is not None and found.size == half.numel():
            found = found.reshape(shape)  # a norm's weights have further dimensions of 1
        _require_equal(name, None if found is None else (found,), 0, half.numpy())
        types["float16"] += 1
    on_progress(Progress("read back", len(shapes), len(shapes), "tensors"))
    for operation, ending in _OPERATIONS.items():
        wanted = sum(count for kind, count in types.items() if kind.endswith(ending))
        if package.census[operation] != wanted:
            raise XinslmError(
                f"the program has {package.census[operation]} of {operation}, the model "
                f"{wanted}; nothing is written"
            )
    return dict(types), rounded


def _compare_codes(name: str, weight: StoredWeight, package: Package) -> str:
    assert weight.scales is not None, "a weight with codes has scales"
    found = package.quantized(name)
    _require_equal(f"{name}, codes", found, 0, codes(weight).numpy())
    _require_equal(f"{name}, scales", found, 1, weight.scales.numpy())
    return f"{BITS[weight.format]}-bit"


def _compare_palette(name: str, palette: Palette, package: Package) -> str:
    found = package.palette(name)
    _require_equal(f"{name}, indices", found, 0, palette.indices.numpy())
    _require_equal(f"{name}, tables", found, 1, palette.tables.numpy())
    return f"{palette.bits}-bit palette"


def _require_equal(
    what: str, found: tuple[np.ndarray, ...] | None, part: int, expected: np.ndarray
) -> None:
    if found is None:
        raise XinslmError(f"{what}: missing in the Core ML program; nothing is written")
    values = found[part]
    if values.shape != expected.shape or not np.array_equal(values, expected):
        same = values.shape == expected.shape
        count = f"{int((values != expected).sum()):,}" if same else "all"
        raise XinslmError(
            f"{what}: {count} values differ in the Core ML program; nothing is written"
        )
