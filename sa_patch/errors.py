"""Mistakes a user can mend, and how any error is told in one line."""

import difflib
from collections.abc import Iterable

REASON_LENGTH = 300


class UserError(ValueError):
    """A request that cannot be served, explained in one sentence.

    The message says what was wrong, what is allowed and what to do. The command line prints it
    without a traceback and exits with status 2; in a notebook it is an ordinary ``ValueError``.
    """


def suggest(word: str, known: Iterable[str]) -> str:
    """A "; did you mean ..." clause for a misspelt word, empty where no word is close."""
    closest = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {closest[0]!r}?" if closest else ";"


def not_allowed(value: object, what: str, allowed: Iterable[str]) -> str:
    """The sentence about a value that is none of those allowed, with the nearest one."""
    options = list(allowed)
    return f"unknown {what} {value!r}{suggest(str(value), options)} allowed: {', '.join(options)}"


def choice(value: str, what: str, allowed: Iterable[str]) -> str:
    """`value`, if it is one of those allowed.

    Raises:
        UserError: if not.
    """
    if value not in allowed:
        raise UserError(not_allowed(value, what, allowed))
    return value


def one_line(error: BaseException) -> str:
    """An exception's kind and message as one line of at most `REASON_LENGTH` characters."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= REASON_LENGTH else f"{line[: REASON_LENGTH - 1]}…"
