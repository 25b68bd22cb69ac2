"""Text files, plain or gzipped, read with the line number of every fault."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sda_fast.data.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = "\ufeff"
_CHUNK_BYTES = 1 << 18
_GZIP_FORMAT = 31


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) for every line of a UTF-8 file, plain or gzipped.

    Whether a file is gzipped is told by its first bytes.

    Raises:
        DataError: no such file; a file named .gz that is not gzip; or, with the line, bytes that are not UTF-8 and
            compressed data that is cut off or damaged.
    """
    line_number = 0
    lines = _split_lines(_read_chunks(Path(path)))
    while True:
        try:
            raw = next(lines, None)
        except EOFError as error:
            raise DataError("the gzip data ends early (truncated file)", path, line_number + 1) from error
        except zlib.error as error:
            raise DataError(f"damaged gzip data ({error})", path, line_number + 1) from error
        if raw is None:
            return
        line_number += 1
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
            raise DataError(f"not UTF-8: {where}", path, line_number) from error
        if line_number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield line_number, line.rstrip("\r\n")


def split_fields(line: str, delimiter: str, path: str | Path, line_number: int) -> list[str]:
    """The fields of one table line; double quotes have their CSV meaning except between tabs.

    Raises:
        DataError: broken quoting.
    """
    if '"' not in line or delimiter == "\t":
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"broken quoting: {error}", path, line_number) from error


def _read_chunks(path: Path) -> Iterator[bytes]:
    if path.is_dir():
        raise DataError("is a folder", path)
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise DataError("no such file", path) from error
    with file:
        start = file.read(len(GZIP_MAGIC))
        file.seek(0)
        if start == GZIP_MAGIC:
            yield from _decompress(file)
        elif path.suffix == ".gz":
            raise DataError(f"named .gz but its first bytes are {start!r}, not gzip's", path, 1)
        else:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


def _decompress(file: BinaryIO) -> Iterator[bytes]:
    # gzip.GzipFile would drop what it had decompressed just before the fault, and with it the line number.
    decompressor = zlib.decompressobj(_GZIP_FORMAT)
    while chunk := file.read(_CHUNK_BYTES):
        while chunk:
            if decompressor.eof:
                chunk = chunk.lstrip(b"\0")
                decompressor = zlib.decompressobj(_GZIP_FORMAT) if chunk else decompressor
                continue
            yield decompressor.decompress(chunk)
            chunk = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
