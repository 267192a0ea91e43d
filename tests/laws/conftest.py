"""The laws hold of flex's lists and mask; only the law on cost compiles them."""

import pytest

from tests.block_walk import walked_lists

__all__ = ["walked_lists"]


@pytest.fixture(autouse=True)
def compile_nothing(request: pytest.FixtureRequest) -> None:
    if request.path.stem != "test_cost":
        request.getfixturevalue("walked_lists")
