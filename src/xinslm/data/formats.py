"""Reads documents from files: .txt, .json, .jsonl, .parquet, and gzip of these.

Files are read as bytes, so that line ends do not change. Every error names the file and the line,
or the byte if the text is not UTF-8. One document is in memory at a time, but a JSON file is read
completely.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from xinslm.data.config import SplitDocuments
from xinslm.data.records import Document, to_document
from xinslm.errors import XinslmError

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
ENDINGS = f"{', '.join(SUFFIXES)}, each also with .gz"
_SEPARATOR = b"<|endoftext|>"
_BOM = b"\xef\xbb\xbf"


def suffix(path: Path) -> str:
    """Return the suffix that determines a file's format, in lower case and without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(
    path: Path, split_documents: SplitDocuments, text_field: str | None
) -> Iterator[Document]:
    """Read one file with a suffix of `SUFFIXES`; XinslmError names it if it is damaged."""
    try:
        with _open(path) as file:
            match suffix(path):
                case ".txt":
                    yield from _read_text(path, file, split_documents)
                case ".json":
                    yield from _read_json(path, file, text_field)
                case ".jsonl":
                    yield from _read_jsonl(path, file, text_field)
                case ".parquet":
                    yield from _read_parquet(path, file, text_field)
    except EOFError:
        raise XinslmError(
            f"{path}: the .gz file is incomplete; copy or download it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise XinslmError(
            f"{path}: not a valid .gz file ({error}); copy or download it again"
        ) from None
    except (PermissionError, IsADirectoryError) as error:
        raise XinslmError(f"{path}: cannot be read ({error.strerror})") from None


def _open(path: Path) -> IO[bytes]:
    is_gzip = path.name.lower().endswith(".gz")
    return cast(IO[bytes], gzip.open(path)) if is_gzip else open(path, "rb")


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, byte offset, line with its end); drop a byte order mark, refuse NUL."""
    offset = 0
    for number, line in enumerate(file, start=1):
        begin = offset
        offset += len(line)
        if number == 1:
            if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise XinslmError(
                    f"{path}: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 "
                    f"{path.name} > utf8.txt"
                )
            if line.startswith(_BOM):
                line, begin = line[len(_BOM) :], len(_BOM)
        if b"\0" in line:
            raise XinslmError(
                f"{path}:{number}: not a text file (NUL at byte {begin + line.index(0):,})"
            )
        yield number, begin, line


def _decode(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise XinslmError(
            f"{path}: byte {offset + error.start:,} (0x{data[error.start]:02x}) is not UTF-8. "
            f"Convert the file, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > "
            f"utf8{path.suffix}"
        ) from None


def _read_text(path: Path, file: IO[bytes], how: SplitDocuments) -> Iterator[Document]:
    """Split a text file into documents; the line end before a separator is part of it."""
    block: list[bytes] = []
    first, begin, cuts = 1, 0, 0

    def document(end: bool) -> Document:
        data = b"".join(block)
        if cuts or not end or how in ("line", "blank-line"):
            data = data.removesuffix(b"\n").removesuffix(b"\r")
        return Document(f"{path}:{first}", text=_decode(path, data, begin))

    for number, offset, line in _lines(path, file):
        bare = line.strip()
        if not block:
            first, begin = number, offset
        is_cut = (how == "auto" and bare == _SEPARATOR) or (how == "blank-line" and not bare)
        if not is_cut:
            block.append(line)
        if is_cut or how == "line":
            yield document(end=False)
            block = []
            cuts += 1
    yield document(end=True)


def _read_jsonl(path: Path, file: IO[bytes], text_field: str | None) -> Iterator[Document]:
    for number, offset, line in _lines(path, file):
        text = _decode(path, line, offset).strip()
        if text:
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deep")
                half = "" if line.endswith(b"\n") else "; the file may be incomplete"
                raise XinslmError(f"{path}:{number}: not valid JSON ({reason}){half}") from None
            yield to_document(record, f"{path}:{number}", text_field)


def _read_json(path: Path, file: IO[bytes], text_field: str | None) -> Iterator[Document]:
    """Read an array or a sequence of records; each is parsed on demand."""
    text = "".join(_decode(path, line, offset) for _, offset, line in _lines(path, file))
    space = re.compile(r"[ \t\r\n]*")
    decoder = json.JSONDecoder()
    position = space.match(text).end()  # type: ignore[union-attr]
    in_array = text[position : position + 1] == "["
    position += in_array
    line, counted, expect_value = 1, 0, False
    while True:
        position = space.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        rest = text[position : position + 1]
        if in_array and rest == "]" and not expect_value:
            if text[position + 1 :].strip():
                raise XinslmError(f"{where}: not valid JSON (something follows the array)")
            return
        if not rest and not in_array:
            return
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deep")
            at = line + text.count("\n", counted, getattr(error, "pos", counted))
            raise XinslmError(
                f"{path}:{at}: not valid JSON ({reason}); the file may be incomplete"
            ) from None
        yield to_document(record, where, text_field)
        position = space.match(text, position).end()  # type: ignore[union-attr]
        expect_value = text[position : position + 1] == ","
        if in_array and not expect_value and text[position : position + 1] != "]":
            at = line + text.count("\n", counted, position)
            raise XinslmError(
                f"{path}:{at}: not valid JSON (no ',' or ']' after a record); the file may be "
                "incomplete"
            )
        position += expect_value and in_array


def _read_parquet(path: Path, file: IO[bytes], text_field: str | None) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
        row = 0
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=512):
            for record in batch.to_pylist():
                row += 1
                yield to_document(record, f"{path}:{row}", text_field)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise XinslmError(
            f"{path}: not a valid Parquet file ({reason}); copy or download it again"
        ) from None
