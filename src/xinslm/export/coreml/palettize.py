"""A pass of coremltools that replaces weights by the palettes that were found for them.

coremltools can take tables from buffers of the module, as it takes scales, but it then looks for
the nearest entry of each weight again with all tables spread out to the size of the weights: 29 GB
for the embedding of a 135M model.
"""

from collections.abc import Mapping
from typing import Any

from xinslm.export.coreml.package import program_names
from xinslm.export.coreml.palettes import Palette


def register_palettes(palettes: Mapping[str, Palette]) -> str:
    """Register the pass for these weights, in place of that of an earlier call; return its name."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    wanted = {other: (name, palettes[name]) for name in palettes for other in program_names(name)}

    @register_pass(namespace="xinslm", override=True, name="palettize")
    class Palettize(AbstractGraphPass):
        def apply(self, prog: Any) -> None:
            """Replace the constants with these names."""
            for function in prog.functions.values():
                for op in list(function.operations):
                    stored = wanted.get(op.name.replace(".", "_"))
                    if op.op_type == "const" and stored is not None:
                        _replace(op, *stored)

    return "xinslm::palettize"


def _replace(op: Any, name: str, palette: Palette) -> None:
    """Put `constexpr_lut_to_dense` in the place of a constant."""
    from coremltools.converters.mil.mil import Builder, types

    index = types.nptype_from_builtin(types.string_to_builtin(f"uint{palette.bits}"))
    shape = op.outputs[0].shape
    axes = (1,) * (len(shape) - 1)
    tables = palette.tables.numpy()
    block = op.enclosing_block
    with block:
        dense = Builder.constexpr_lut_to_dense(
            indices=palette.indices.numpy().astype(index).reshape(shape),
            lut=tables.reshape(len(tables), *axes, tables.shape[1], 1),
            before_op=op,
            name=f"{name.replace('.', '_')}_palettized",
        )
    block.replace_uses_of_var_after_op(
        anchor_op=op,
        old_var=op.outputs[0],
        new_var=dense,
        no_check_var_types=True,
        force_replace=True,
    )
    block.remove_ops([op])
