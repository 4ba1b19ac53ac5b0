"""Damaged and hostile model files: a UsageError or XinslmError, or a model that still loads;
nothing else, and no allocation that a number in the file alone asks for.

Each file is small, is made here and is then changed: bytes of the header, its numbers, its end.
"""

import json
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from small_models import save_quantized
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig, PackedConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.export.packed import run as export_packed
from xinslm.files import sha256_file
from xinslm.gguf_file import GgufFile
from xinslm.inference.native_engine import build
from xinslm.inference.raw_weights import RawModel, _open, open_raw
from xinslm.native import library

pytestmark = pytest.mark.without_library
needs_library = pytest.mark.skipif(library() is None, reason="the native library is not there")
ROOM = 1 << 30
"""Bytes of address space that a test may take beyond what it has."""
EXTREME = (0, 1, 2**31 - 1, 2**31, 2**32 + 1, 2**53, 2**62, 2**63, 2**64 - 1)
TEXTS = ("", "x", "\x00", "tokenizer", 7, -1, 2**63, 1.5, True, None, [], [1], {}, {"a": 1})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    save_quantized(folder, "untied")
    export_gguf(GgufConfig(folder / "q", folder / "m.gguf"))
    if library() is not None:
        export_packed(PackedConfig(folder / "q", folder / "m.packed"))
    return folder


@pytest.fixture
def bounded() -> Iterator[None]:
    """A process that asks for a lot of memory gets a MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def use(raw: RawModel | None) -> None:
    """What the native engine does with a model."""
    if raw is None:
        return
    if library() is not None:
        build(raw)
    for name in raw.names:
        weight = raw.read(name)
        assert weight.data.nbytes >= 0 and len(weight.shape) == 2
        raw.forget(name)


def survive(action: Callable[[], None]) -> bool:
    """Whether it was refused with an error of ours; any other error is the test's."""
    try:
        action()
    except (UsageError, XinslmError) as error:
        assert str(error)
        return True
    return False


def header_end(path: Path) -> int:
    return min(tensor.data_offset for tensor in GgufFile(path).tensors.values())


def changed(data: bytes, at: int, by: bytes) -> bytes:
    return data[:at] + by + data[at + len(by) :]


def variants(data: bytes, end: int, source: random.Random, count: int) -> Iterator[bytes]:
    """`data` cut off at every 1/64, and with random changes of its first `end` bytes."""
    for part in range(64):
        yield data[: len(data) * part // 64]
        yield data[: end * part // 64]
    for _ in range(count):
        at, number = source.randrange(end), source.choice(EXTREME)
        kind = source.randrange(4)
        if kind == 0:
            yield changed(data, at, bytes([source.randrange(256)]))
        elif kind == 1:
            yield changed(data, at, struct.pack("<Q", number))
        elif kind == 2:
            yield changed(data, at, struct.pack("<I", number % 2**32))
        else:
            yield data[:at] + source.randbytes(source.randrange(1, 9)) + data[at:]


def tensor_entries(path: Path) -> list[int]:
    """Where the entries of a GGUF file's tensors are: the byte behind each name."""
    data, places = path.read_bytes(), []
    for name in GgufFile(path).tensors:
        text = struct.pack("<Q", len(name)) + name.encode()
        places.append(data.index(text) + len(text))
    return places


def hostile_gguf(path: Path, target: Path, count: int) -> tuple[int, int]:
    """Read variants of a file; return how many, and how many were refused."""
    data, source = path.read_bytes(), random.Random(1)
    files = list(variants(data, header_end(path), source, count))
    for place in tensor_entries(path):
        dimensions = struct.unpack_from("<I", data, place)[0]
        kind = place + 4 + 8 * dimensions
        for number in EXTREME:
            files += [changed(data, place + 4, struct.pack("<Q", number))]
            files += [changed(data, kind + 4, struct.pack("<Q", number))]
            files += [changed(data, place, struct.pack("<I", number % 2**32))]
            files += [changed(data, kind, struct.pack("<I", number % 2**32))]
    refused = 0
    for content in files:
        target.write_bytes(content)
        refused += survive(lambda: use(_open(target)))
    return len(files), refused


@pytest.mark.usefixtures("bounded")
def test_gguf_files(made: Path, tmp_path: Path) -> None:
    count, refused = hostile_gguf(made / "m.gguf", tmp_path / "m.gguf", 1500)
    assert refused > count // 4


@needs_library
@pytest.mark.usefixtures("bounded")
def test_packed_files(made: Path, tmp_path: Path) -> None:
    count, refused = hostile_gguf(made / "m.packed", tmp_path / "m.gguf", 1500)
    assert refused > count // 4


@pytest.mark.usefixtures("bounded")
def test_values_of_gguf_keys(made: Path, tmp_path: Path) -> None:
    """Every number of the model's shape takes extreme values; every text, other types."""
    data, target = (made / "m.gguf").read_bytes(), tmp_path / "m.gguf"
    keys = GgufFile(made / "m.gguf").keys
    refused = 0
    for name, value in keys.items():
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        kind = struct.unpack_from("<I", data, at)[0]
        rests: list[bytes] = []
        if kind in (4, 5, 6):
            rests = [struct.pack("<II", kind, number % 2**32) for number in EXTREME]
            others = [changed(data, at, rest) for rest in rests]
        elif isinstance(value, str):
            size = 12 + len(value.encode())
            rests = [struct.pack("<IB", 7, 1), struct.pack("<IIQ", 9, 4, 0)]
            rests += [struct.pack("<IIQI", 9, 4, 1, 7), struct.pack("<IQ", 8, 0)]
            others = [data[:at] + rest + data[at + size :] for rest in rests]
        else:
            continue
        for content in others:
            # the data begins where it did, as far as the alignment allows
            target.write_bytes(content)
            refused += survive(lambda: use(_open(target)))
    assert refused > 50


def safetensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def headers(header: dict, source: random.Random) -> Iterator[object]:
    """Headers that are JSON, and wrong."""
    for name, entry in source.sample(sorted(header.items()), 4):
        for value in (*EXTREME, *TEXTS, -1):
            yield {**header, name: value}
            yield {**header, name: {**entry, "dtype": value}}
            yield {**header, name: {**entry, "shape": value}}
            yield {**header, name: {**entry, "shape": [value]}}
            yield {**header, name: {**entry, "shape": [*entry["shape"][:-1], value]}}
            yield {**header, name: {**entry, "data_offsets": [0, value]}}
            yield {**header, name: {**entry, "data_offsets": [value, value]}}
            yield {**header, name: {**entry, "data_offsets": value}}
        yield {**header, name: {**entry, "shape": []}}
        yield {**header, name: {**entry, "shape": [], "data_offsets": [0, 4]}}
        yield {**header, name: {**entry, "shape": [2**31] * 9999}}
        yield {key: value for key, value in header.items() if key != name}
        for other in ("9" * 5000, "99", str(2**32), "x", "٣"):
            renamed = {**header, name.replace("layers.0", f"layers.{other}"): entry}
            yield {key: value for key, value in renamed.items() if key != name}
    for value in (*EXTREME, *TEXTS):
        yield value
    yield b"[" * 100000
    yield b'{"a":' * 100000
    yield b"\xff\xfe"
    yield b'{"a": ' + b"9" * 10000 + b"}"


@pytest.mark.parametrize("folder", ["full", "q"])
@pytest.mark.usefixtures("bounded")
def test_safetensors_headers(made: Path, tmp_path: Path, folder: str) -> None:
    shutil.copytree(made / folder, tmp_path / "m")
    path = next(tmp_path.glob("m/*.safetensors"))
    data, source = path.read_bytes(), random.Random(2)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    files = list(variants(data, 8 + length, source, 600))
    files += [safetensors(value, data[8 + length :]) for value in headers(header, source)]
    refused = 0
    for content in files:
        path.write_bytes(content)
        sign(tmp_path / "m")
        refused += survive(lambda: use(_open(tmp_path / "m")))
    assert refused > len(files) // 3


def sign(folder: Path) -> None:
    """Make the manifest agree with the files: who writes a hostile file also writes its hash."""
    place = folder / "manifest.json"
    if not place.exists():
        return
    manifest = json.loads(place.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            facts = manifest["files"][name]
            facts["bytes"], facts["sha256"] = (folder / name).stat().st_size, ""
            facts["sha256"] = sha256_file(folder / name)
    place.write_text(json.dumps(manifest))


def test_a_weight_of_another_type_than_the_manifest_says_is_refused(
    made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "q", tmp_path / "q")
    path = next(tmp_path.glob("q/*.safetensors"))
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    sign(tmp_path / "q")
    with pytest.raises(XinslmError, match="is I32, but the manifest says f32; quantize again"):
        use(_open(tmp_path / "q"))


@pytest.mark.parametrize("folder", ["full", "q"])
@pytest.mark.usefixtures("bounded")
def test_settings(made: Path, tmp_path: Path, folder: str) -> None:
    """config.json of both folders, and the formats of a quantized one."""
    shutil.copytree(made / folder, tmp_path / "m")
    place, refused, count = tmp_path / "m" / "config.json", 0, 0
    settings = json.loads(place.read_text())
    nested = settings.get("rope_parameters", {})
    cases = [{**settings, key: value} for key in settings for value in (*EXTREME, *TEXTS)]
    cases += [
        {**settings, "rope_parameters": {**nested, key: value}}
        for key in ("rope_type", "rope_theta", "factor")
        for value in (*EXTREME, *TEXTS)
    ]
    for case in (*cases, *TEXTS):
        place.write_text(json.dumps(case))
        sign(tmp_path / "m")
        refused, count = refused + survive(lambda: use(_open(tmp_path / "m"))), count + 1
    place.write_text("[" * 100000)
    sign(tmp_path / "m")
    assert survive(lambda: use(_open(tmp_path / "m")))
    assert refused > count // 10
    place.write_text(json.dumps(settings))
    if folder == "q":
        sign(tmp_path / "m")
        hostile_formats(tmp_path / "m")


def hostile_formats(folder: Path) -> None:
    place = folder / "manifest.json"
    manifest = json.loads(place.read_text())
    formats = manifest["formats"]
    name = next(name for name, kind in formats.items() if kind == "q4_0")
    cases = [{**manifest, "formats": {**formats, name: value}} for value in (*TEXTS, "q8_0", "f16")]
    cases += [{**manifest, key: value} for key in manifest for value in TEXTS]
    cases += [{**manifest, "formats": {**formats, "model.layers.7.mlp.up_proj": "q4_0"}}]
    for case in (*cases, *TEXTS):
        place.write_text(json.dumps(case))
        survive(lambda: use(_open(folder)))


def test_sound_files_load(made: Path) -> None:
    """The tests above change files that are good."""
    for name in ("full", "q", "m.gguf", *(["m.packed"] if library() else [])):
        raw = open_raw(made / name)
        assert raw is not None
        use(raw)


@pytest.mark.usefixtures("bounded")
def test_memory_is_bounded() -> None:
    with pytest.raises(MemoryError):
        np.zeros(2 * ROOM, np.uint8)
