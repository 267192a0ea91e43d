"""Key-value recall: pairs are shown, other text follows, then each key is asked for its value.

Every key and value is a token of its own in the tokenizer, so that an answer is one token and a
guess among all values is right once in as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEYS, VALUES = 16, 16
KEY_TOKENS = [f"<|key{index}|>" for index in range(KEYS)]
VALUE_TOKENS = [f"<|value{index}|>" for index in range(VALUES)]
START_TOKEN = "<|recall|>"
# Pairs of an episode, how often each key is asked, and tokens of text between pairs and questions.
# Many short questions teach what recall is, those after a gap tell how far it reaches.
_PAIRS, _ROUNDS = (2, 6), 4
_BETWEEN = (0, 16, 64, 160)


@dataclass(frozen=True)
class RecallTokens:
    """Ids of the tokens that recall documents are made of."""

    start: int
    keys: tuple[int, ...]
    values: tuple[int, ...]


def recall_document(
    generator: np.random.Generator, length: int, tokens: RecallTokens, text: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Episodes one after another until the document is full.

    An episode shows pairs and asks each key four times. Keys come again in other episodes with
    other values, so that the latest pair counts.

    Args:
        length: n, at least 64.
        text: what stands between pairs and questions is cut from here.

    Returns:
        Tokens ``[n]`` and distances ``[n]``: at a value that answers a question, how many tokens
        before the question's key its value was seen last, elsewhere 0.
    """
    ids = np.empty(length, dtype=np.int64)
    distance = np.zeros(length, dtype=np.int64)
    at = 0
    while True:
        pairs = int(generator.integers(_PAIRS[0], _PAIRS[1] + 1))
        between = int(generator.choice(_BETWEEN))
        room = length - at - 1 - 2 * pairs * (1 + _ROUNDS)
        if room < 0:
            break
        between = min(between, room)
        keys = generator.permutation(KEYS)[:pairs]
        values = dict(zip(keys, generator.integers(VALUES, size=pairs), strict=True))
        seen: dict[int, int] = {}
        ids[at] = tokens.start
        at += 1
        for turn in range(1 + _ROUNDS):
            if turn == 1:
                ids[at : at + between] = _excerpt(generator, between, text)
                at += between
            for key in keys if turn == 0 else generator.permutation(keys):
                ids[at : at + 2] = tokens.keys[key], tokens.values[values[key]]
                if turn > 0:
                    distance[at + 1] = at - seen[key]
                seen[key] = at + 1
                at += 2
    ids[at:] = _excerpt(generator, length - at, text)
    return ids, distance


def _excerpt(
    generator: np.random.Generator, length: int, text: NDArray[np.uint32]
) -> NDArray[np.int64]:
    first = int(generator.integers(max(1, len(text) - length)))
    return np.resize(text[first : first + length], length).astype(np.int64)
