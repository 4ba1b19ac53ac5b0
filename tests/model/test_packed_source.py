"""Folders quantized by other programs, against the libraries that write them or by definition."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import load_model, open_model


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    save_random_model(folder)
    return folder


def write(full, folder, tensors, **settings):
    """A copy of the model with other tensors and entries in config.json."""
    shutil.copytree(full, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pack(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes (rows, n) in words (rows, n * bits / 32), one after the other."""
    words = np.zeros((codes.shape[0], codes.shape[1] * bits // 32), np.uint32)
    for column in range(codes.shape[1]):
        word, place = divmod(column * bits, 32)
        words[:, word] |= codes[:, column].astype(np.uint32) << np.uint32(place)
    return torch.from_numpy(words.view(np.int32))


def gptq_model(full, folder, bits=4, group=32, version=1):
    """Random codes, zero points and scales, columns in a random order of groups."""
    rng = np.random.default_rng(bits)
    tensors, expected = load_file(full / "model.safetensors"), {}
    for name in [n for n in tensors if "_proj" in n]:
        rows, columns = tensors.pop(name).shape
        stem, groups = name.removesuffix(".weight"), columns // group
        codes = rng.integers(0, 2**bits, (rows, columns))
        zeros = rng.integers(1, 2**bits, (groups, rows))
        scales = rng.normal(0, 0.05, (groups, rows)).astype(np.float16)
        order = rng.permutation(np.arange(columns) // group)
        tensors[f"{stem}.qweight"] = pack(codes, bits).T.contiguous()
        tensors[f"{stem}.qzeros"] = pack(zeros - (version == 1), bits)
        tensors[f"{stem}.scales"] = torch.from_numpy(scales)
        tensors[f"{stem}.g_idx"] = torch.from_numpy(order.astype(np.int32))
        weight = np.empty((rows, columns), np.float32)
        for column in range(columns):
            g = order[column]
            weight[:, column] = (codes[:, column] - zeros[g]) * scales[g].astype(np.float32)
        expected[name] = torch.from_numpy(weight)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True}
    settings["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return write(full, folder, tensors, quantization_config=settings), expected


@pytest.mark.parametrize(
    ("bits", "group", "version"), [(4, 32, 1), (8, 16, 1), (2, 32, 1), (4, 32, 2)]
)
def test_gptq_with_zero_points_and_any_order_of_columns(full, tmp_path, bits, group, version):
    folder, expected = gptq_model(full, tmp_path / "gptq", bits, group, version)
    found = load_model(folder).state_dict()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    source = open_model(folder)
    name = next(iter(expected))
    assert source.shape_of(name) == tuple(expected[name].shape)
    assert torch.equal(source.tensor(name, 3, 9), expected[name][3:9])
    assert source.num_weights == sum(w.numel() for w in load_model(full).parameters())


@pytest.mark.parametrize(("group", "order"), [(32, None), (16, None), (32, "unused"), (32, "any")])
def test_compressed_tensors_as_the_library_packs_them(full, tmp_path, group, order):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rng = np.random.default_rng(0)
    tensors, expected = load_file(full / "model.safetensors"), {}
    for name in [n for n in tensors if "_proj" in n]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix(".weight")
        codes = torch.from_numpy(rng.integers(-8, 8, (rows, columns)).astype(np.int8))
        scales = torch.from_numpy(rng.normal(0, 0.1, (rows, columns // group)).astype(np.float32))
        tensors[f"{stem}.weight_packed"] = helpers.pack_to_int32(codes, 4)
        tensors[f"{stem}.weight_scale"] = scales
        tensors[f"{stem}.weight_shape"] = torch.tensor([rows, columns])
        groups = torch.arange(columns) // group
        if order == "any":
            groups = groups[torch.from_numpy(rng.permutation(columns))]
        if order is not None:
            index = groups if order == "any" else torch.full((columns,), -1)
            tensors[f"{stem}.weight_g_idx"] = index.int()
        expected[name] = codes.float() * scales[:, groups]
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    folder = write(full, tmp_path / "ct", tensors, quantization_config=settings)
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (2, 32), (4, 64)])
def test_mlx_as_the_library_quantizes(full, tmp_path, bits, group):
    mx = pytest.importorskip("mlx.core")
    tensors, expected = load_file(full / "model.safetensors"), {}
    for name in [n for n in tensors if tensors[n].dim() == 2]:
        weight = mx.array(tensors[name].numpy())
        if weight.shape[1] % group:
            continue
        packed, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
        stem = name.removesuffix(".weight")
        tensors[name] = torch.from_numpy(np.array(packed).view(np.int32)).view(torch.uint32)
        tensors[f"{stem}.scales"] = torch.from_numpy(np.array(scales))
        tensors[f"{stem}.biases"] = torch.from_numpy(np.array(biases))
        back = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
        expected[name] = torch.from_numpy(np.array(back))
    folder = write(
        full, tmp_path / "mlx", tensors, quantization={"group_size": group, "bits": bits}
    )
    found = load_model(folder).state_dict()
    for name, weight in expected.items():
        # mlx multiplies and adds in one step
        assert torch.allclose(found[name], weight, rtol=1e-6, atol=1e-6), name
    assert expected


def broken(folder, **changes):
    """Replace tensors of a folder; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for end, value in changes.items():
        name = next(n for n in tensors if n.endswith(f"k_proj.{end}"))
        del tensors[name]
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g_idx": torch.full((64,), 99, dtype=torch.int32)}, "do not fit together"),
        ({"scales": torch.ones(1, 3)}, "do not fit together"),
        ({"g_idx": None}, "has no 'model.layers.0.self_attn.k_proj.g_idx'"),
    ],
)
def test_damaged_parts_are_named(full, tmp_path, changes, message):
    folder, _ = gptq_model(full, tmp_path / "gptq")
    broken(folder, **changes)
    with pytest.raises(XinslmError, match=message):
        load_model(folder)


def test_what_is_not_supported_is_named(full, tmp_path):
    folder, _ = gptq_model(full, tmp_path / "gptq")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bits"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(XinslmError, match="codes of 3 bits; 2, 4 and 8 are supported"):
        load_model(folder)
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises((UsageError, XinslmError), match="quantization_config"):
        load_model(folder)


def test_other_formats_of_compressed_tensors_are_not_taken_for_codes(full, tmp_path):
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    tensors = load_file(full / "model.safetensors")
    folder = write(full, tmp_path / "fp8", tensors, quantization_config=settings)
    assert open_model(folder).kind == "model"  # transformers reads it
    with pytest.raises(XinslmError, match="quantization_config"):
        load_model(folder)
