"""Open a GGUF file safely: its keys, and its tensors as memory maps.

The `gguf` package, llama.cpp's own, parses the file but checks little. What llama.cpp refuses is
refused here: split files, and tensors that overlap, are misaligned or end behind the file.
"""

from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError

_AGAIN = "the file is damaged. Copy or download it again"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its first bytes, or is named like one."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


class GgufFile:
    """The keys and tensors of a file."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        self.path = path
        try:
            reader = GGUFReader(path)
            self.keys: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except Exception as error:  # the reader raises what it stumbles over
            if "is not a valid GGMLQuantizationType" in str(error):
                raise UsageError(
                    f"{path} has weights of a type that the installed gguf package does not know "
                    f"({error}). Update it, or take another quantization"
                ) from None
            raise XinslmError(
                f"{path} is not a whole GGUF file ({error}); copy or download it again"
            ) from None
        parts = self.keys.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise UsageError(
                f"{path} is one of several parts; join them first: llama-gguf-split "
                f"--merge {path.name} OUT"
            )
        _require_sound_places(reader, path)
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        """gguf's `ReaderTensor` by name: `data`, `tensor_type`, `shape`."""


def _require_sound_places(reader: Any, path: Path) -> None:
    end, before, size = reader.data_offset, "the header", path.stat().st_size
    for tensor in sorted(reader.tensors, key=lambda tensor: (tensor.data_offset, tensor.n_bytes)):
        begin, wrong = int(tensor.data_offset), None
        if (begin - reader.data_offset) % reader.alignment:
            wrong = f"begins at byte {begin:,}, which is not aligned to {reader.alignment}"
        elif begin < end:
            wrong = f"overlaps {before}"
        elif begin + tensor.n_bytes > size:
            wrong = f"ends at byte {begin + tensor.n_bytes:,}, but the file has {size:,}"
        if wrong:
            raise XinslmError(f"{path}: weight '{tensor.name}' {wrong}; {_AGAIN}")
        end, before = begin + int(tensor.n_bytes), f"'{tensor.name}'"
