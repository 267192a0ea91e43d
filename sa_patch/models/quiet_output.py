"""Keep other libraries' bars, logs and warnings off the screen, and at hand if a cell fails."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import deque
from collections.abc import Iterator

LOGGERS = (
    "lm_eval",
    "lm-eval",
    "transformers",
    "datasets",
    "evaluate",
    "accelerate",
    "huggingface_hub",
)
KEPT_LINES = 400


class CapturedOutput(io.TextIOBase):
    """A text stream that keeps its last lines; a redrawn progress bar counts as one line."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._open = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *complete, self._open = (self._open + text).split("\n")
        self._lines.extend(line.rsplit("\r", 1)[-1] for line in complete)
        self._open = self._open.rsplit("\r", 1)[-1]
        return len(text)

    def text(self) -> str:
        return "\n".join([*self._lines, self._open]).strip()


@contextlib.contextmanager
def silenced() -> Iterator[CapturedOutput]:
    """Send what is printed, logged or warned in here to the `CapturedOutput` that is yielded."""
    output = CapturedOutput()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = []
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers, logger.propagate = [handler], False
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield output
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
