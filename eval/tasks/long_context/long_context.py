"""Documents of three tasks whose facts are hidden in filler, and their scores by depth.

`passkey`: one number. `multikey`: the pass words of four people, of which one is asked for.
`vartrack`: two chains of assignments, of which one is asked for its value.

A document's `depth` (0 to 1) is the place of the fact that holds the answer. Ten documents in a row
have ten different depths, so that `--limit` keeps the depths balanced. No prompt is longer than its
target, answer included. As in `needle`, whose filler and words these tasks share, everything comes
from a seed by `random.random()` alone.
"""

import math
import random
import runpy
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict

# lm-eval runs a task's code outside any package, so the neighbour is found by its path.
needle = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "needle" / "needle.py"), run_name="needle")
)

T = TypeVar("T")

STEPS = needle.DEPTH_STEPS
DEPTHS = [round(100 * (step + 0.5) / STEPS) for step in range(STEPS)]

# One digit: common tokenizers split numbers into digits, and recall of many is beyond small models.
DIGITS = list("0123456789")
PASSKEY = "The pass key is {number}."
PASSKEY_QUESTION = "\nQuestion: What is the pass key?\nAnswer: The pass key is"
# The question (16), the fact (7), the answer (2) and the token that many models put first.
PASSKEY_TOKENS = 26
# The filler that the literature hides pass keys in. It says nothing, unlike needle's.
REFRAIN = [
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
]
REFRAIN_TOKENS = 24

NAMES = needle.words("Mary John James David Anna Peter Paul Sarah Michael Thomas")
KEYS = 4
PASS_WORD = "The pass word of {name} is {word}."
PASS_WORD_QUESTION = (
    "\nQuestion: What is the pass word of {name}?\nAnswer: The pass word of {name} is"
)
# The question (20), four facts (8 each), the answer and the first token.
MULTIKEY_TOKENS = 54

# The variables are people, their values digits; a chain's sentences stand together.
VALUES = list("123456789")
CHAINS = 2
HOPS = 1
HEAD = "The number of {name} is {value}."
LINK = "The number of {name} is the number of {source}."
VARTRACK_QUESTION = "\nQuestion: What is the number of {name}?\nAnswer: The number of {name} is"
# The question (18), two chains (18 each), the answer (2) and the first token.
VARTRACK_TOKENS = 57


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())


def depth_of(index: int) -> float:
    """Steps of 3, which share no factor with 10: each run of ten documents visits every depth."""
    return (3 * index % STEPS + 0.5) / STEPS


def spread(depth: float, count: int) -> list[float]:
    """`count` depths at even distances, `depth` first; past the end they go on at the start."""
    return [(depth + place / count) % 1.0 for place in range(count)]


def hide(filler: Sequence[str], facts: Sequence[tuple[float, str]]) -> str:
    """The filler with each fact after the share of it that stands before the fact."""
    sentences = list(filler)
    # From the back, so that no fact moves the places of those still to come.
    for depth, fact in sorted(facts, reverse=True):
        sentences.insert(round(depth * len(filler)), fact)
    return " ".join(sentences)


def needle_filler(rng: random.Random, tokens: int) -> list[str]:
    """At most `tokens` of needle's sentences."""
    return [needle.filler_sentence(rng) for _ in range(tokens // needle.FILLER_TOKENS)]


def passkey_document(rng: random.Random, index: int, target_tokens: int) -> dict[str, Any]:
    """A number in the refrain. A hundred documents pair each digit once with each depth."""
    depth = depth_of(index)
    answer = (index + index // STEPS) % len(DIGITS)
    sentences = (target_tokens - PASSKEY_TOKENS) * len(REFRAIN) // REFRAIN_TOKENS
    first = int(rng.random() * len(REFRAIN))
    filler = [REFRAIN[(first + place) % len(REFRAIN)] for place in range(sentences)]
    return {
        "prompt": hide(filler, [(depth, PASSKEY.format(number=DIGITS[answer]))]) + PASSKEY_QUESTION,
        "choices": DIGITS,
        "answer": answer,
        "depth": depth,
    }


def multikey_document(rng: random.Random, index: int, target_tokens: int) -> dict[str, Any]:
    """Pass words of KEYS people at even distances; the choices are the words of all of them."""
    depth = depth_of(index)
    names = shuffled(rng, NAMES)[:KEYS]
    words = shuffled(rng, needle.PASS_WORDS)[:KEYS]
    facts = [
        (place, PASS_WORD.format(name=name, word=word))
        for place, name, word in zip(spread(depth, KEYS), names, words, strict=True)
    ]
    filler = needle_filler(rng, target_tokens - MULTIKEY_TOKENS)
    choices = shuffled(rng, words)
    return {
        "prompt": hide(filler, facts) + PASS_WORD_QUESTION.format(name=names[0]),
        "choices": choices,
        "answer": choices.index(words[0]),
        "depth": depth,
    }


def vartrack_document(rng: random.Random, index: int, target_tokens: int) -> dict[str, Any]:
    """CHAINS chains of assignments at even distances; the choices are the values of all of them."""
    depth = depth_of(index)
    variables = shuffled(rng, NAMES)
    values = shuffled(rng, VALUES)[:CHAINS]
    facts, ends = [], []
    for place, value in zip(spread(depth, CHAINS), values, strict=True):
        names = [variables.pop() for _ in range(HOPS + 1)]
        links = [LINK.format(name=name, source=source) for source, name in pairwise(names)]
        facts.append((place, " ".join([HEAD.format(name=names[0], value=value), *links])))
        ends.append(names[-1])
    filler = needle_filler(rng, target_tokens - VARTRACK_TOKENS)
    choices = shuffled(rng, values)
    return {
        "prompt": hide(filler, facts) + VARTRACK_QUESTION.format(name=ends[0]),
        "choices": choices,
        "answer": choices.index(values[0]),
        "depth": depth,
    }


def task(
    name: str, document: Callable[[random.Random, int, int], dict[str, Any]]
) -> Callable[..., DatasetDict]:
    """The function by which lm-eval asks for a task's documents.

    lm-eval also passes the task's metadata and the model's arguments, among which may be a `seed`
    or a `window`: the parameters have names of their own so that these change nothing.
    """

    def documents(
        target_tokens: int, hiding_seed: int = 0, hiding_documents: int = 100, **_: Any
    ) -> DatasetDict:
        rows = [
            document(random.Random(f"{name} {hiding_seed} {target_tokens} {i}"), i, target_tokens)
            for i in range(hiding_documents)
        ]
        return DatasetDict({"test": Dataset.from_list(rows)})

    return documents


passkey = task("passkey", passkey_document)
multikey = task("multikey", multikey_document)
vartrack = task("vartrack", vartrack_document)


def scores(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float | None]:
    """Accuracy, and the same as that of the document's depth in %, for reports by depth.

    The other depths are None and not left out: lm-eval's processes must all name the same metrics.
    """
    likelihoods = [likelihood for likelihood, _ in results]
    correct = float(likelihoods.index(max(likelihoods)) == doc["answer"])
    own = round(100 * doc["depth"])
    by_depth = {f"acc_depth_{depth}": correct if depth == own else None for depth in DEPTHS}
    return {"acc": correct, **by_depth}


def mean_of_known(values: Sequence[float | None]) -> float:
    """The mean of what is not None; NaN where `--limit` leaves a depth without documents."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
