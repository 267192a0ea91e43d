"""Labelled texts as words: read, split, numbered and put into batches of similar length."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sa_patch.errors import UserError, one_line

PADDING, UNKNOWN = "[PAD]", "[UNK]"  # numbers 0 and 1
_UNKNOWN_NUMBER = 1
# Words that occur once in the training texts teach nothing.
_LEAST_OFTEN = 2
# Batches that are sorted by length together: little padding, and texts still meet at random.
_SORTED_BATCHES = 32

Columns = tuple[str, str]
"""The columns of texts and of labels."""


@dataclass(frozen=True)
class Texts:
    """Texts and their labels, ``0 .. classes - 1``."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Texts:
        """Those at the given places."""
        return Texts(tuple(self.texts[i] for i in places), tuple(self.labels[i] for i in places))


@dataclass(frozen=True)
class LabelledTexts:
    """A data set.

    Attributes:
        fingerprint: sha256 of all texts and labels, in order.
    """

    train: Texts
    test: Texts
    classes: int
    fingerprint: str

    def split(self, share: float, seed: int) -> tuple[Texts, Texts]:
        """The training texts without a random share, and that share; no test text in either.

        Raises:
            UserError: if none would be left to train on.
        """
        order = np.random.default_rng([seed, len(self.train)]).permutation(len(self.train))
        held_out = max(1, round(share * len(self.train)))
        if held_out >= len(self.train):
            raise UserError(
                f"holding {share:g} of {len(self.train)} training texts out leaves none to train "
                "on; give more texts, or a smaller --held-out"
            )
        return self.train.take(order[held_out:].tolist()), self.train.take(
            order[:held_out].tolist()
        )


@lru_cache(maxsize=4)
def load_texts(source: str, columns: Columns = ("text", "label")) -> LabelledTexts:
    """Read the splits "train" and "test" of a data set.

    Args:
        source: the first argument of ``datasets.load_dataset``: a hub id, or a local folder that
            is laid out like one.

    Raises:
        UserError: if it cannot be read, or lacks a split or a column.
    """
    import datasets

    datasets.disable_progress_bars()
    local = Path(source).is_dir()
    # Its cache takes folders of one name and layout for each other, whatever is in them.
    with tempfile.TemporaryDirectory() if local else nullcontext() as own:
        try:
            found: Any = datasets.load_dataset(source, cache_dir=own, keep_in_memory=local)
        except Exception as error:  # each kind of source fails in its own ways
            raise UserError(f"cannot read the data set {source!r}: {one_line(error)}") from error
    splits, digest = [], hashlib.sha256()
    for name in ("train", "test"):
        if name not in found:
            raise UserError(f"{source!r} has no split {name!r}; it has {', '.join(found)}")
        known = found[name].column_names
        for column in columns:
            if column not in known:
                raise UserError(f"{source!r} has no column {column!r}; it has {', '.join(known)}")
        texts, labels = (tuple(found[name][column]) for column in columns)
        splits.append((tuple(map(str, texts)), labels))
        for text, label in zip(*splits[-1], strict=True):
            digest.update(f"{name}\0{label}\0{text}\0".encode())
    kinds = sorted({label for _, labels in splits for label in labels}, key=str)
    if len(kinds) < 2 or not all(texts for texts, _ in splits):
        raise UserError(f"{source!r} needs texts in both splits, and at least two labels")
    train, test = (Texts(texts, tuple(map(kinds.index, labels))) for texts, labels in splits)
    return LabelledTexts(train, test, len(kinds), digest.hexdigest())


def learn_words(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of lower-case words and punctuation, the most frequent of the texts.

    Args:
        vocabulary: words at most, `PADDING` (number 0) and `UNKNOWN` among them.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts,
        trainers.WordLevelTrainer(
            vocab_size=vocabulary,
            min_frequency=_LEAST_OFTEN,
            special_tokens=[PADDING, UNKNOWN],
            show_progress=False,
        ),
    )
    return tokenizer


class Numbered:
    """Texts as numbers of words, and their labels.

    Args:
        max_length: words of a text that are read, from its start.
    """

    def __init__(self, texts: Texts, tokenizer: Tokenizer, max_length: int) -> None:
        encoded = tokenizer.encode_batch_fast(list(texts.texts))
        # A text without a word is read as one unknown word: there must be something to average.
        self.words = [each.ids[:max_length] or [_UNKNOWN_NUMBER] for each in encoded]
        self.labels = torch.tensor(texts.labels)
        self._tokenizer = tokenizer

    def spelt(self, numbers: Sequence[int]) -> list[str]:
        """The words of these numbers."""
        return [self._tokenizer.id_to_token(number) or UNKNOWN for number in numbers]

    def __len__(self) -> int:
        return len(self.words)

    def batches(self, size: int, order: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Words int64 ``[batch, n]``, what is real bool ``[batch, n]`` and labels ``[batch]``."""
        for low in range(0, len(order), size):
            places = order[low : low + size]
            rows = [torch.tensor(self.words[place]) for place in places]
            words = pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            real = torch.arange(words.shape[1]) < lengths[:, None]
            yield words, real, self.labels[torch.tensor(places)]

    def epoch(self, size: int, seed: int, epoch: int) -> list[int]:
        """An order of all texts for batches of `size`: random, but of similar length in each."""
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(self)).tolist()
        batches: list[list[int]] = []
        for low in range(0, len(order), size * _SORTED_BATCHES):
            pool = order[low : low + size * _SORTED_BATCHES]
            pool.sort(key=lambda place: len(self.words[place]))
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        # A short batch must stay last, or the batches after it would be cut elsewhere.
        whole = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]
        generator.shuffle(whole)
        return [place for batch in [*whole, *rest] for place in batch]

    def by_length(self) -> list[int]:
        """All texts from short to long."""
        return sorted(range(len(self)), key=lambda place: len(self.words[place]))
