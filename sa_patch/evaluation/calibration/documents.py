"""What layers are calibrated on: documents, and which of their tokens count.

Three kinds. "recall": filler that hides pass words and asks for them at the end; the answers
count. "source": code of Python's standard library; its last quarter counts. "text": a
user's own file, in windows; the last quarter of each counts. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sa_patch.errors import UserError
from sa_patch.files.packaged import tasks_dir

PASS_WORDS_HIDDEN = 4
# Of a document's tokens, the share at the end that counts in sources and texts.
COUNTED_SHARE = 4
# Of source code, far more than common tokenizers put into a token: 3 to 4.5.
CHARACTERS_PER_TOKEN = 16


class Tokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...


@dataclass(frozen=True)
class Document:
    """One text, as the model reads it.

    Args:
        kind: "recall", "source" or "text".
        tokens: ids, with the tokenizer's first special token if it has one.
        counted: places in `tokens` whose log-likelihood counts; none is 0.
        asked: of "recall", the places of the answers' first tokens.
        choices: of "recall", the first tokens of all pass words there are, hidden or not.
    """

    kind: str
    tokens: tuple[int, ...]
    counted: tuple[int, ...]
    asked: tuple[int, ...] = ()
    choices: tuple[int, ...] = ()


def generated_documents(
    tokenizer: Tokenizer, tokens: int, documents: int, held_out: bool, one_question: bool = False
) -> list[Document]:
    """As many of each kind as `documents`; held-out ones share no text with the others.

    Args:
        tokens: length of each, at most (recall) or exactly (source).
        one_question: see `recall_documents`.

    Raises:
        UserError: if there is not so much source, or `tokens` has no room for the questions.
    """
    start = documents if held_out else 0
    recall = recall_documents(tokenizer, tokens, documents, start, one_question)
    return recall + _sources(tokenizer, tokens, documents, held_out)


def recall_documents(
    tokenizer: Tokenizer,
    tokens: int,
    documents: int,
    start: int = 0,
    one_question: bool = False,
) -> list[Document]:
    """Filler that hides pass words and asks for them, of `tokens` at most; see the module.

    Args:
        one_question: at the end, as a prompt has it, for one pass word, which every other document
            hides alone; else for each of four.

    Raises:
        UserError: if `tokens` has no room for the questions.
    """
    hidden = [1 if one_question and index % 2 == 0 else PASS_WORDS_HIDDEN for index in range(2)]
    return [
        _recall(tokenizer, tokens, index, hidden[index % 2], 1 if one_question else None)
        for index in range(start, start + documents)
    ]


def first_stdlib_window(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """The first document of ``stdlib_position_N``, of N tokens."""
    sources = _task_module("stdlib_perplexity", "stdlib_sources")
    text = sources.windows(tokens)["test"][0]["text"]
    return list(tokenizer.encode(text, add_special_tokens=True, verbose=False)[:tokens])


def file_documents(
    tokenizer: Tokenizer, path: Path, tokens: int, documents: int, held_out: bool
) -> list[Document]:
    """Windows of a text file, one after the other; held-out ones are the next.

    Raises:
        UserError: if the file cannot be read or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read as UTF-8 text: {error}") from error
    ids = _encode(tokenizer, text)
    first = _first(tokenizer)
    room = tokens - len(first)
    begin = documents if held_out else 0
    found = len(ids) // room
    if found < begin + documents:
        raise UserError(
            f"--text {path} holds {found} windows of {tokens} tokens, and {begin + documents} are "
            "needed; give a longer text, or fewer --documents or a smaller --n"
        )
    windows = [ids[room * i : room * (i + 1)] for i in range(begin, begin + documents)]
    return [_at_the_end("text", first + window) for window in windows]


def _first(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text, but not what some put after it."""
    probe = "a"
    around = list(tokenizer.encode(probe, add_special_tokens=True, verbose=False))
    bare = _encode(tokenizer, probe)
    return next((around[:i] for i in range(len(around)) if around[i : i + len(bare)] == bare), [])


def _at_the_end(kind: str, tokens: Sequence[int]) -> Document:
    """A document whose last part counts."""
    start = max(1, len(tokens) - len(tokens) // COUNTED_SHARE)
    return Document(kind, tuple(tokens), tuple(range(start, len(tokens))))


def _recall(
    tokenizer: Tokenizer, tokens: int, index: int, hidden: int, asked_for: int | None
) -> Document:
    needle = _task_module("needle", "needle")
    rng = random.Random(f"calibration {index}")

    def shuffled(words: list[str]) -> list[str]:
        return sorted(words, key=lambda _: rng.random())

    owners = shuffled(needle.SUBJECTS)[:hidden]
    words = dict(zip(owners, shuffled(needle.PASS_WORDS), strict=False))
    filler = [needle.filler_sentence(rng) for _ in range(-(-tokens // needle.FILLER_TOKENS))]
    questions = _questions(tokenizer, words, shuffled(owners)[:asked_for])
    # Of several the question says which; one alone lies anywhere.
    shift = 0.5 if hidden > 1 else rng.random()
    while True:
        body = _first(tokenizer) + _encode(tokenizer, _hide(filler, words, shift))
        surplus = len(body) + sum(len(ids) for ids, _ in questions) - tokens
        if surplus <= 0:
            break
        if not filler:
            raise UserError(
                f"--n {tokens} has no room for the pass words and their questions, which take "
                f"{tokens + surplus} tokens and more with filler; give a larger --n, or --text"
            )
        del filler[-max(1, surplus // (2 * needle.FILLER_TOKENS)) :]
    counted: list[int] = []
    asked: list[int] = []
    for ids, is_answer in questions:
        if is_answer:
            asked.append(len(body))
            counted += range(len(body), len(body) + len(ids))
        body = body + ids
    choices = {_encode(tokenizer, f" {word}")[0] for word in needle.PASS_WORDS}
    return Document("recall", tuple(body), tuple(counted), tuple(asked), tuple(sorted(choices)))


def _hide(filler: Sequence[str], words: dict[str, str], shift: float) -> str:
    """The filler with a sentence for each pass word, each so far into its own equal part."""
    sentences = list(filler)
    for place, (owner, word) in reversed(list(enumerate(words.items()))):
        depth = int((place + shift) / len(words) * len(filler))
        sentences.insert(depth, f"The pass word of the {owner} is {word}.")
    return " ".join(sentences)


def _questions(
    tokenizer: Tokenizer, words: dict[str, str], order: Sequence[str]
) -> list[tuple[list[int], bool]]:
    """Token ids of questions and answers in turn, and whether they are an answer's."""
    parts = []
    for owner in order:
        asked = f"\nQuestion: What is the pass word of the {owner}?\nAnswer:"
        asked += f" The pass word of the {owner} is"
        parts.append((_encode(tokenizer, asked), False))
        parts.append((_encode(tokenizer, f" {words[owner]}"), True))
        parts.append((_encode(tokenizer, "."), False))
    return parts[:-1]


def _sources(tokenizer: Tokenizer, tokens: int, documents: int, held_out: bool) -> list[Document]:
    names = _task_module("stdlib_perplexity", "stdlib_sources").MODULES
    # Every other module is held out, so that both halves go through the whole alphabet.
    half = names[1::2] if held_out else names[::2]
    first = _first(tokenizer)
    found: list[Document] = []
    for name in half:
        if len(found) == documents:
            break
        path = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")[: CHARACTERS_PER_TOKEN * tokens]
        ids = first + _encode(tokenizer, text)
        if len(ids) >= tokens:
            found.append(_at_the_end("source", ids[:tokens]))
    if len(found) < documents:
        raise UserError(
            f"Python's standard library has {len(found)} of {documents} source files of {tokens} "
            "tokens here; give fewer --documents, a smaller --n, or a text of your own with --text"
        )
    return found


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # Not verbose: a text longer than the model's context is cut here, and needs no warning.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _task_module(folder: str, name: str) -> Any:
    """A generator of one of our own tasks, which lie outside the package."""
    path = tasks_dir() / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"sa_patch_task_{name}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be read; install sa_patch again")
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
