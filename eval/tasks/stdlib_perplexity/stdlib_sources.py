"""Documents of the running Python's own source files, for two tasks. Nothing is downloaded.

`stdlib_perplexity` reads the beginnings of the files. A document's length in tokens is estimated
from its text, so every model reads the same text; for SmolLM2's tokenizer the estimate is right to
about 5% (standard deviation over the files below).

`stdlib_position` reads whole files, joined, in windows of exactly as many tokens as it asks for:
a document is longer than any common tokenizer needs, and the model cuts it.
"""

import platform
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

PYTHON_VERSION = platform.python_version()

# The sources differ between releases of Python, so its version is part of the task's version:
# scores under two versions are scores on two different texts.
TASK_VERSION = f"1.0+python{PYTHON_VERSION}"

# Named one by one, not found by listing a folder: the set must be the same on every machine.
# Each is a single file of over 8,000 characters in Python 3.11 to 3.14.
MODULE_NAMES = """
    argparse ast base64 bdb calendar cmd codecs compileall configparser contextlib csv
    dataclasses difflib dis doctest enum fileinput fractions ftplib functools gettext gzip heapq
    imaplib inspect ipaddress mailbox mimetypes optparse os pdb pickle pickletools pkgutil
    platform plistlib pprint pstats pydoc random selectors shutil smtplib socket socketserver
    statistics subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback
    typing uuid wave weakref webbrowser
"""
MODULES = MODULE_NAMES.split()

# What byte-pair tokenizers split on before they merge: a word with the space before it, a digit,
# a run of punctuation, a run of white space.
PIECE = re.compile(r" ?[^\W\d_]+| ?\d| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")

# Tokens of SmolLM2's tokenizer for one piece, mean over MODULES (long words take several).
TOKENS_PER_PIECE = 1.12

# Source text takes 3 to 4.5 characters per token of common tokenizers.
CHARACTERS_PER_TOKEN = 6


def beginning(text: str, target_tokens: int) -> str:
    """The beginning of `text` that is about `target_tokens` long; never more than the text."""
    pieces = round(target_tokens / TOKENS_PER_PIECE)
    end = 0
    for count, match in enumerate(PIECE.finditer(text), start=1):
        end = match.end()
        if count >= pieces:
            break
    return text[:end]


def documents(target_tokens: int, **_: Any) -> DatasetDict:
    """One document per module, in the order of `MODULES`.

    lm-eval also passes the task's metadata and the model's arguments; they change nothing here.
    Raises FileNotFoundError where Python was installed without its sources.
    """
    rows = [{"module": name, "text": beginning(source(name), target_tokens)} for name in MODULES]
    return DatasetDict({"test": Dataset.from_list(rows)})


def windows(window_tokens: int, **_: Any) -> DatasetDict:
    """Documents of at least `window_tokens` tokens: whole modules joined until they are enough.

    No module is in two documents. The rest is as for `documents`.
    """
    return joined(map(source, MODULES), window_tokens)


def joined(texts: Iterable[str], window_tokens: int) -> DatasetDict:
    """Documents of at least `window_tokens` tokens, of texts joined until they are enough."""
    characters = CHARACTERS_PER_TOKEN * window_tokens
    rows, text = [], ""
    for each in texts:
        text += each
        if len(text) >= characters:
            rows.append({"text": text[:characters], "tokens": window_tokens})
            text = ""
    return DatasetDict({"test": Dataset.from_list(rows)})


def source(name: str) -> str:
    """The text of a module of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    file = stdlib / f"{name}.py"
    if not file.is_file():
        raise FileNotFoundError(
            f"these tasks read the sources of Python's standard library, but {stdlib} has no "
            f"{name}.py; use a Python that is installed with its sources"
        )
    return file.read_text(encoding="utf-8")
