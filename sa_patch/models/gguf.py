"""GGUF files: is one whole before it is loaded, and is it read once while it is."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
# GGUF's scalar types (uint8, int8, uint16, ..., float64) as struct codes; bool is one byte.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
CACHED_FILES = 4  # read at a time; a model has one


class _Broken(Exception):
    """Why the header makes no sense."""


class _Cursor:
    """Reads little-endian values one after the other and notices the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def skip(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise _Broken("the file ends within its header")
        return start

    def number(self, code: str) -> Any:
        start = self.skip(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def text(self) -> bytes:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length]

    def value(self, kind: int) -> Any:
        """A metadata value; the content of arrays is passed over."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise _Broken(f"its metadata holds a value of unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in SCALARS:
            self.skip(struct.calcsize(f"<{SCALARS[item]}") * count)
        elif item == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise _Broken(f"its metadata holds an array of unknown type {item}")
        return None


def check_gguf(path: Path) -> None:
    """Pass if `path` begins like a GGUF file and is long enough for all its tensors.

    Reads the header and no weights. `gguf.GGUFReader` takes seconds for what takes milliseconds
    here, since it keeps every string of the vocabulary, and a damaged file is a bare numpy error
    to it.

    Raises:
        UserError: if not ("corrupt GGUF"), or if the package gguf, which reads it, is missing.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package gguf; install it with `pip install 'sa_patch[demo]'`"
        ) from error
    sizes = {int(kind): block_and_bytes for kind, block_and_bytes in GGML_QUANT_SIZES.items()}
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise _Broken("it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                needed = _needed_bytes(_Cursor(data), sizes)
                if needed > len(data):
                    raise _Broken(
                        f"its tensors need {needed:,} bytes, but the file ends after {len(data):,}"
                    )
    except _Broken as reason:
        raise UserError(
            f"corrupt GGUF {path}: {reason}; get the file again from where it came"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _needed_bytes(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> int:
    """Where the last tensor ends, counted from the beginning of the file."""
    cursor.skip(len(MAGIC))
    version = cursor.number("I")
    if version not in VERSIONS:
        raise _Broken(f"its version is {version}, and only versions 2 and 3 can be read")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    if not tensors:
        raise _Broken("it holds no tensors")
    alignment = DEFAULT_ALIGNMENT
    for _ in range(entries):
        key = cursor.text()
        value = cursor.value(cursor.number("I"))
        if key == b"general.alignment":
            alignment = value
    if not isinstance(alignment, int) or alignment < 1:
        raise _Broken(f"its alignment is {alignment!r}")
    ends = [_tensor_end(cursor, sizes) for _ in range(tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    return data_start + max(ends)


def _tensor_end(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> int:
    """End of the next listed tensor, counted from where the tensor data begins."""
    cursor.text()
    dimensions = [cursor.number("Q") for _ in range(cursor.number("I"))]
    kind, offset = cursor.number("I"), cursor.number("Q")
    # A type that this gguf package does not know yet is left to whoever loads the weights.
    block, bytes_per_block = sizes.get(kind, (1, 0))
    return int(offset + prod(dimensions) // block * bytes_per_block)


@contextmanager
def reading_gguf_once() -> Iterator[None]:
    """Remember GGUF files, and the names of their tensors, while models are loaded inside.

    transformers reads a file's header, a vocabulary of a hundred thousand strings in it, for the
    configuration, for the weights and for the tokenizer, and makes the table of tensor names anew
    for every module: 10 of the 17 seconds that the embedded model takes on one core. It gets the
    same objects here, made once.
    """
    try:
        import gguf
    except ImportError:
        # Then there is no GGUF file to load; what needs one says so itself.
        yield
        return
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lru_cache(CACHED_FILES)(reader)
    gguf.get_tensor_name_map = lru_cache(CACHED_FILES)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
