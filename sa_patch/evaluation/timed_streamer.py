"""Shows text as it is generated, and remembers when each token came."""

from __future__ import annotations

import time
from typing import Any

from transformers import TextStreamer


class TimedStreamer(TextStreamer):
    """transformers' streamer, which is handed the prompt first and then token by token."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._prompt_tokens = 0
        self._times: list[float] = []

    def put(self, value: Any) -> None:
        if not self._times:
            self._prompt_tokens = int(value.shape[-1])
        self._times.append(time.perf_counter())
        super().put(value)

    def rates(self) -> str:
        """Tokens a second of the prompt, up to the first new token, and of further new tokens."""
        first, *rest = self._times
        said = f"prompt of {self._prompt_tokens:,} tokens"
        if rest and rest[0] > first:
            said += f" at {self._prompt_tokens / (rest[0] - first):,.0f} a second"
        if len(rest) > 1 and rest[-1] > rest[0]:
            said += f"; new tokens at {(len(rest) - 1) / (rest[-1] - rest[0]):,.1f} a second"
        return said
