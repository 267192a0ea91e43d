"""A sweep of seconds, for tests of the engines that run it."""

from typing import Any

SETTINGS: dict[str, Any] = {
    "windows": [16],
    "methods": ["full", "swa", {"method": "sa", "seeds": [0, 1]}, {"method": "moba", "topk": 2}],
    "tasks": ["needle_128"],
    "limit": 2,
    "batch_size": 4,
    "dtype": "float32",
}
