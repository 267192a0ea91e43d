"""Launch parameters in files: read for the card at hand, ignored with one sentence otherwise."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sa_patch.benchmark.tuning import write_table
from sa_patch.kernels.triton import launch_files, launch_table
from sa_patch.kernels.triton.launch_files import cached_folder, measured_launches
from sa_patch.kernels.triton.launch_table import (
    BandConfig,
    Launch,
    MobaConfig,
    band_config,
    moba_config,
)

CARD: tuple[str, tuple[int, int]] = ("NVIDIA L40S", (8, 9))
RING = BandConfig(Launch(16, 16, 2, 5), tiles=8, permute_once=True)
MOBA = MobaConfig(Launch(16, 16), Launch(32, 64), Launch(32, 16))
ENTRIES = {"ring 2 128": dataclasses.asdict(RING), "moba 2 128": dataclasses.asdict(MOBA)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forget() -> None:
        measured_launches.cache_clear()
        launch_table._of_card.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARD[1])
    forget()
    yield
    forget()


def inputs(width: int = 128) -> Any:
    """As much of a tensor on a GPU as the table asks for."""
    device = torch.device("cuda", 0)
    return SimpleNamespace(device=device, shape=(1, 8, 64, width), element_size=lambda: 2)


def test_what_was_measured_on_the_card_comes_first() -> None:
    plain = band_config(inputs(), 64, "ampere")
    launch_table._of_card.cache_clear()
    write_table(cached_folder(), *CARD, ENTRIES)
    assert band_config(inputs(), 64, "ampere", ring=True) == RING
    assert moba_config(inputs(), 64, 128, "ampere") == MOBA
    # What no entry names is as it was: other uses, widths and kinds of call.
    assert band_config(inputs(), 64, "ampere") == plain
    assert band_config(inputs(64), 64, "ampere", ring=True) != RING
    assert band_config(inputs(), 64, "ampere", ring=True, joining=True) != RING
    assert moba_config(inputs(), 64, 128, "ampere", shared=True) != MOBA
    # Another card's entries are its own.
    assert measured_launches(CARD[0], (9, 0)) == measured_launches("NVIDIA H100", CARD[1]) == {}


def test_entries_of_the_same_card_stay_and_the_users_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_files, "SHIPPED", tmp_path / "shipped")
    write_table(tmp_path / "shipped", *CARD, ENTRIES)
    mine = dataclasses.asdict(replaced := BandConfig(Launch(64, 64)))
    write_table(cached_folder(), *CARD, {"window 2 128": mine})
    write_table(cached_folder(), *CARD, {"ring 2 128": mine})
    assert set(measured_launches(*CARD)) == {"window 2 128", "ring 2 128", "moba 2 128"}
    assert band_config(inputs(), 64, "ampere", ring=True) == replaced


@pytest.mark.parametrize(
    "change, words",
    [
        ({"triton": "2.0.0"}, "they were measured with Triton 2.0.0"),
        ({"schema": 99}, "cannot be read"),
        ({"entries": {"ring 2 128": {"launch": "large"}}}, "cannot be read"),
        ({"entries": []}, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_trusted_is_ignored_with_one_sentence(
    change: dict[str, Any] | None, words: str
) -> None:
    path = write_table(cached_folder(), *CARD, ENTRIES)
    whole = path.read_text()
    path.write_text(whole[:50] if change is None else json.dumps(json.loads(whole) | change))
    with pytest.warns(UserWarning, match=words) as said:
        first = band_config(inputs(), 64, "ampere", ring=True)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert first != RING
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert band_config(inputs(), 64, "ampere", ring=True) == first


def test_an_entry_of_another_make_is_ignored() -> None:
    write_table(cached_folder(), *CARD, {"ring 2 128": {"launch": {"block": 16}}})
    with pytest.warns(UserWarning, match="'ring 2 128' are ignored"):
        assert band_config(inputs(), 64, "ampere", ring=True) != RING
