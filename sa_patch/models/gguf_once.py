"""Has transformers read a GGUF file once in a load, and not once for each thing it needs of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

FILES = 4  # read at a time; a model has one


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
    gguf.GGUFReader = lru_cache(FILES)(reader)
    gguf.get_tensor_name_map = lru_cache(FILES)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
