"""Documents that no model before November 2026 can have read. Nothing is downloaded.

A model may know the standard library by heart; these texts show what a pattern loses on new ones.

`unseen.txt.xz` holds modules of `sa_patch/kernels` and `sa_patch/patterns`, in the order of their
paths, as of this repository's commit cbea9709bf9f9c837f78d93a7158bee2b9657045 (2026-11-30): 491,520
characters whose SHA-256 is 3e741f7bdd18c9385340c67149dfacebb016dfba6962fa35c20d944a6ac7dddd.
`scripts/freeze_unseen_text` made it. It stays as it is when the package changes; a digest of what
is read is part of the task's version.
"""

import hashlib
import lzma
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

CHARACTERS_PER_TOKEN = 6  # more than any common tokenizer needs: the model cuts its tokens


def text() -> str:
    """The whole frozen text."""
    packed = Path(__file__).with_name("unseen.txt.xz").read_bytes()
    return lzma.decompress(packed).decode()


def windows(window_tokens: int, **_: Any) -> DatasetDict:
    """Documents of at least `window_tokens` tokens: the text cut into equal parts, from its start.

    lm-eval also passes the task's metadata and the model's arguments; they change nothing here.
    """
    size = CHARACTERS_PER_TOKEN * window_tokens
    whole = text()
    parts = [whole[start : start + size] for start in range(0, len(whole) - size + 1, size)]
    rows = [{"text": part, "tokens": window_tokens} for part in parts]
    return DatasetDict({"test": Dataset.from_list(rows)})


TASK_VERSION = "1.0+" + hashlib.sha256(text().encode()).hexdigest()[:12]
