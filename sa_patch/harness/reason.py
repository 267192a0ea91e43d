"""Exceptions of other libraries as one line that a person can read in a table or a log."""

REASON_LENGTH = 300


def one_line(error: BaseException) -> str:
    """An exception's kind and message as one line of at most `REASON_LENGTH` characters."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= REASON_LENGTH else f"{line[: REASON_LENGTH - 1]}…"
