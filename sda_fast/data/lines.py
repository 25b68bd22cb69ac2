"""Text files, plain or gzipped, read with the line number of every fault."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from sda_fast.data.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = "\ufeff"


def open_binary(path: str | Path) -> BinaryIO:
    """Open a file for reading bytes, decompressing if its first bytes (not its name) say gzip.

    Raises:
        DataError: there is no such file, or it is named .gz and is not gzip.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError("no such file" if isinstance(error, FileNotFoundError) else "is a folder", path) from error
    start = file.read(2)
    file.seek(0)
    if start == GZIP_MAGIC:
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if path.suffix == ".gz":
        file.close()
        raise DataError(f"named .gz but its first bytes are {start!r}, not gzip's", path, 1)
    return file


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) for every line of a UTF-8 file, plain or gzipped.

    Raises:
        DataError: with the line, if the bytes are not UTF-8 or the compressed data is cut off or damaged.
    """
    line_number = 0
    with open_binary(path) as file:
        lines = iter(io.BufferedReader(cast(io.RawIOBase, file), 1 << 20) if isinstance(file, gzip.GzipFile) else file)
        while True:
            try:
                raw = next(lines, None)
            except EOFError as error:
                raise DataError("the gzip data ends early (truncated file)", path, line_number + 1) from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"damaged gzip data ({error})", path, line_number + 1) from error
            if raw is None:
                return
            line_number += 1
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise DataError(
                    f"not UTF-8: byte 0x{byte:02x} at byte {error.start + 1} of the line", path, line_number
                ) from error
            if line_number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            yield line_number, line.rstrip("\r\n")
