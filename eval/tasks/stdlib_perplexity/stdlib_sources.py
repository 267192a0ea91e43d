"""Documents for `stdlib_perplexity`: the beginnings of the running Python's own source files.

Nothing is downloaded and no tokenizer is needed. A document's length in tokens is estimated from
its text, so every model reads the same text; for SmolLM2's tokenizer the estimate is right to
about 5% (standard deviation over the files below).
"""

import platform
import re
import sysconfig
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
    stdlib = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in MODULES if not (stdlib / f"{name}.py").is_file()]
    if missing:
        raise FileNotFoundError(
            f"stdlib_perplexity reads the sources of Python's standard library, but {stdlib} has "
            f"no {missing[0]}.py; use a Python that is installed with its sources"
        )
    rows = []
    for name in MODULES:
        text = beginning((stdlib / f"{name}.py").read_text(encoding="utf-8"), target_tokens)
        rows.append({"module": name, "text": text})
    return DatasetDict({"test": Dataset.from_list(rows)})
