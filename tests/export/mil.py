"""Runs a Core ML package on any machine: the operations of a MIL program, one by one, in PyTorch.

The package is read by coremltools' own loader. Each operation follows its description in
coremltools' documentation. Floats have the program's types, or float32 all over if `wide`, which
leaves only the rounding of the stored constants.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from coremltools import models
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil import types

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


class Program:
    """A program with its states; a call is a prediction."""

    def __init__(self, path: Path, wide: bool = False) -> None:
        model = models.MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        program = load(spec, spec.specificationVersion, model.weights_dir)
        self.function, self.wide = program.functions["main"], wide
        self.states = {
            name: torch.zeros([int(size) for size in var.shape], dtype=self.dtype("fp16"))
            for name, var in self.function.inputs.items()
            if types.is_state(var.sym_type)
        }

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.wide and name == "fp16" else DTYPES[name]

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        values: dict[str, object] = {}
        for name, value in inputs.items():
            is_float = value.is_floating_point()
            values[name] = value.to(self.dtype("fp16") if is_float else torch.int32)
        for op in self.function.operations:
            if op.op_type == "const":
                values[op.outputs[0].name] = self.constant(op.val.val)
                continue
            given = {name: self.given(var, values) for name, var in op.inputs.items()}
            (output,) = op.outputs or (None,)
            result = getattr(self, op.op_type)(**given)
            if output is not None:
                # the type that the program states is that of the result
                if torch.is_tensor(result):
                    stated = self.dtype(types.builtin_to_string(output.dtype))
                    assert result.dtype == stated, (op.op_type, output.name, result.dtype)
                values[output.name] = result
        (output,) = self.function.outputs
        return values[output.name]

    def given(self, var, values):
        if isinstance(var, (list, tuple)):
            return [self.given(one, values) for one in var]
        if types.is_state(var.sym_type):
            return var.name
        return values[var.name]

    def constant(self, value):
        if isinstance(value, (str, bool)) or value is None:
            return value
        array = np.asarray(value)
        if array.dtype.kind in "iu" and array.ndim == 0:
            return int(array)
        if array.dtype.kind == "b":
            return array.tolist()
        tensor = torch.from_numpy(np.array(array))
        if array.dtype == np.float16 and self.wide:
            tensor = tensor.float()
        return tensor.int() if array.dtype.kind in "iu" else tensor

    def constexpr_blockwise_shift_scale(self, data, scale):
        blocks = data.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
        return (blocks * scale[..., None]).flatten(1)

    def constexpr_lut_to_dense(self, indices, lut):
        assert lut.shape[-1] == 1 and indices.dim() == lut.dim() - 2
        sizes = [i // t for i, t in zip(indices.shape, lut.shape[:-2], strict=True)]
        for axis, size in enumerate(sizes):
            lut = lut.repeat_interleave(size, axis)
        return lut[..., 0].gather(-1, indices.long()[..., None])[..., 0]

    def shape(self, x):
        return torch.tensor(x.shape, dtype=torch.int32)

    def gather(self, x, indices, axis, batch_dims, validate_indices):
        assert axis == 0 and batch_dims == 0 and not validate_indices
        return x[indices] if torch.is_tensor(indices) else x[int(indices)]

    def sub(self, x, y):
        return x - y

    def add(self, x, y):
        return x + y

    def mul(self, x, y):
        return x * y

    def concat(self, values, axis, interleave):
        assert not interleave
        parts = [v if torch.is_tensor(v) else torch.tensor([v], dtype=torch.int32) for v in values]
        return torch.cat([p[None] if p.dim() == 0 else p for p in parts], dim=axis)

    def region(self, x, begin, end, begin_mask=None, end_mask=None, stride=None, squeeze_mask=None):
        assert stride is None or set(ints(stride)) == {1}
        none = [False] * x.dim()
        rows = zip(
            ints(begin),
            ints(end),
            begin_mask or none,
            end_mask or none,
            x.shape,
            strict=True,
        )
        return tuple(
            slice(0 if no_begin else start, size if no_end else stop)
            for start, stop, no_begin, no_end, size in rows
        )

    def slice_by_index(self, x, **where):
        squeezed = [i for i, is_one in enumerate(where.get("squeeze_mask") or ()) if is_one]
        part = x[self.region(x, **where)]
        assert all(part.shape[axis] == 1 for axis in squeezed)
        return part.squeeze(squeezed) if squeezed else part

    def slice_update(self, x, update, **where):
        assert not any(where.get("squeeze_mask") or ())
        x = x.clone()
        assert x[self.region(x, **where)].shape == update.shape
        x[self.region(x, **where)] = update
        return x

    def tile(self, x, reps):
        return x.repeat(*ints(reps))

    def greater_equal(self, x, y):
        return x >= y

    def select(self, cond, a, b):
        return torch.where(cond, a, b)

    def cast(self, x, dtype):
        return x.to(self.dtype(dtype))

    def reduce_mean(self, x, axes, keep_dims):
        squares = x.float().mean(ints(axes), keepdim=keep_dims)
        return squares.to(x.dtype)

    def reduce_max(self, x, axes, keep_dims):
        return x.amax(ints(axes), keepdim=keep_dims)

    def abs(self, x):
        return x.abs()

    def clip(self, x, alpha, beta):
        return x.clamp(float(alpha), float(beta))

    def real_div(self, x, y):
        return x / y

    def softmax(self, x, axis):
        return x.softmax(axis)

    def matmul(self, x, y, transpose_x, transpose_y):
        x, y = x.mT if transpose_x else x, y.mT if transpose_y else y
        return x @ y

    def conv(self, x, weight, strides, pad_type, pad, dilations, groups, bias=None):
        assert set(ints(strides) + ints(dilations)) == {1} and pad_type == "valid" and groups == 1
        assert weight.shape[2:] == (1, 1) and x.shape[0] == x.shape[2] == 1
        y = weight[:, :, 0, 0] @ x[0, :, 0]
        return (y if bias is None else y + bias[:, None])[None, :, None]

    def squeeze(self, x, axes):
        return x.squeeze(ints(axes))

    def rsqrt(self, x, epsilon):
        return torch.rsqrt(x + torch.as_tensor(epsilon, dtype=x.dtype))

    def linear(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def reshape(self, x, shape):
        return x.reshape(ints(shape))

    def transpose(self, x, perm):
        return x.permute(ints(perm))

    def expand_dims(self, x, axes):
        for axis in ints(axes):
            x = x.unsqueeze(axis)
        return x

    def silu(self, x):
        return F.silu(x)

    def scaled_dot_product_attention(self, query, key, value, attn_mask):
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + attn_mask
        return scores.softmax(-1) @ value

    def read_state(self, input):
        return self.states[input]

    def coreml_update_state(self, state, value):
        self.states[state] = value
        return value


def ints(values) -> list[int]:
    return torch.as_tensor(values).reshape(-1).tolist()
