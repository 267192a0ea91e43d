"""Documents for `needle`: one sentence with a pass word, hidden in filler; recall it at the end.

Everything is generated from a seed with `random.random()` alone, the one part of Python's `random`
whose sequence is promised to stay the same between releases.
"""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict


def words(text: str) -> list[str]:
    return text.split()


# Every word here is one token of common byte-pair tokenizers, so a length in tokens is a count of
# words and full stops, and an answer is one token: all choices are scored in one forward pass.
PASS_WORDS = words(
    "tiger eagle rabbit dragon turtle whale monkey elephant spider lion wolf bear snake shark "
    "horse mouse sheep duck frog camel"
)
SUBJECTS = words(
    "teacher farmer doctor student writer worker driver artist soldier sailor baker nurse "
    "lawyer engineer singer king queen child woman man"
)
VERBS = words("found carried opened painted watched cleaned moved counted repaired described")
ADJECTIVES = words("old new small large red blue heavy wooden broken simple bright empty")
OBJECTS = words("table chair window door box book map clock bottle lamp basket letter wall boat")
PLACES = words("garden market kitchen school village station forest library office street")
TIMES = words("morning evening summer winter spring afternoon")

CHOICES = 8
DEPTH_STEPS = 10
NEEDLE = "The pass word is {word}."
QUESTION = "\nQuestion: What is the pass word?\nAnswer: The pass word is"
# The question (16), the needle (6) and the token that many models put first.
TOKENS_AROUND = 23
FILLER_TOKENS = 13


def pick(rng: random.Random, words: Sequence[str]) -> str:
    return words[int(rng.random() * len(words))]


def filler_sentence(rng: random.Random) -> str:
    """One sentence of 12 words and a full stop, hence of 13 tokens, with none of PASS_WORDS."""
    return (
        f"The {pick(rng, SUBJECTS)} {pick(rng, VERBS)} the {pick(rng, ADJECTIVES)} "
        f"{pick(rng, OBJECTS)} in the {pick(rng, PLACES)} in the {pick(rng, TIMES)}."
    )


def document(index: int, target_tokens: int, needle_seed: int) -> dict[str, Any]:
    """Document `index`; its needle stands after about `depth` (0 to 1) of the filler.

    Ten documents in a row have ten different depths, so that `--limit` keeps the depths balanced.
    """
    rng = random.Random(f"needle {needle_seed} {target_tokens} {index}")
    choices = sorted(PASS_WORDS, key=lambda _: rng.random())[:CHOICES]
    answer = int(rng.random() * CHOICES)
    sentences = round((target_tokens - TOKENS_AROUND) / FILLER_TOKENS)
    filler = [filler_sentence(rng) for _ in range(sentences)]
    # 3 and 10 share no factor: each run of ten documents visits every depth once.
    depth = (3 * index % DEPTH_STEPS + 0.5) / DEPTH_STEPS
    before = round(depth * sentences)
    filler.insert(before, NEEDLE.format(word=choices[answer]))
    return {
        "prompt": " ".join(filler) + QUESTION,
        "choices": choices,
        "answer": answer,
        "depth": depth,
        "sentences_after": sentences - before,
    }


def documents(
    target_tokens: int, needle_seed: int = 0, needle_documents: int = 100, **_: Any
) -> DatasetDict:
    """`needle_documents` documents of about `target_tokens` tokens each.

    lm-eval also passes the task's metadata and the model's arguments, among which may be a `seed`
    or a `window`: the parameters here have names of their own so that these change nothing.
    """
    rows = [document(index, target_tokens, needle_seed) for index in range(needle_documents)]
    return DatasetDict({"test": Dataset.from_list(rows)})
