"""Settings from YAML: what is read, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator

from sa_patch.errors import UserError
from sa_patch.files.settings import LISTED, Positive, Settings, Text, read_yaml


def even(number: int) -> int:
    if number % 2:
        raise UserError(f"{number} is odd")
    return number


class Wheel(Settings):
    inches: Positive = 28
    width: float | None = None


class Bicycle(Settings):
    name: Text
    kind: Literal["road", "city bike"] = "road"
    speeds: Literal[1, 3] = 3
    wheels: Annotated[tuple[Wheel, ...], LISTED] = ()
    spokes: Annotated[tuple[Annotated[int, AfterValidator(even)], ...], LISTED] = ()
    extras: dict[str, Any] = {}


def test_a_single_value_is_a_list_and_nothing_an_empty_one() -> None:
    read = Bicycle.read({"name": "x", "wheels": {"width": 3}, "spokes": None}, "the file")
    assert read == Bicycle(name="x", wheels=(Wheel(width=3.0),), spokes=())
    assert Bicycle.read({"name": "x", "spokes": [4, 2]}, "the file").spokes == (4, 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nme": 1}, "unknown key 'nme' in the file; did you mean 'name'? known: name, kind, spee"),
        ({3: 1}, "unknown key 3 in the file; known: name"),
        ({"name": " "}, "name must be text that is not empty, got ' '"),
        ({"name": 3}, "name must be text, got 3"),
        (
            {"kind": "citybike"},
            "unknown kind 'citybike'; did you mean 'city bike'? allowed: road, ",
        ),
        ({"speeds": 2}, "unknown speeds 2; allowed: 1, 3"),
        ({"wheels": 3}, "wheels[0] must be a mapping of keys to values, got 3"),
        ({"wheels": [{}, {"inch": 1}]}, "unknown key 'inch' in 'wheels[1]'; did you mean 'inches'"),
        ({"wheels": {"inches": 0}}, "wheels[0].inches must be at least 1, got 0"),
        ({"wheels": {"inches": 1.5}}, "wheels[0].inches must be a whole number, got 1.5"),
        ({"wheels": {"inches": True}}, "wheels[0].inches must be a whole number, got True"),
        ({"wheels": {"inches": [1]}}, "wheels[0].inches must be a whole number, got [1]"),
        ({"wheels": {"width": "x"}}, "wheels[0].width must be a number, got 'x'"),
        ({"wheels": {"width": float("inf")}}, "wheels[0].width must be a finite number, got inf"),
        ({"spokes": 3}, "3 is odd"),
        ({"extras": []}, "extras must be a mapping of keys to values, got []"),
    ],
)
def test_mistakes_are_named_in_one_sentence(change: dict[Any, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Bicycle.read({"name": "x", **change}, "the file")
    assert str(caught.value).startswith(sentence)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="^the file lacks the key 'name'$"):
        Bicycle.read({}, "the file")
    with pytest.raises(UserError, match="^the file must be a mapping of keys to values, got None$"):
        Bicycle.read(None, "the file")


@pytest.mark.parametrize("content", [b"a: [1", b"\t:", b"\xff"])
def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.yaml is not a readable YAML file") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read: No such file"):
        read_yaml(tmp_path / "gone.yaml")


def test_what_was_left_out_is_completed_key_by_key() -> None:
    given = Bicycle.read({"name": "x", "extras": {"bell": 1}, "kind": "road"}, "the file")
    defaults = {"kind": "city bike", "speeds": 1, "extras": {"bell": 2, "lock": 3}, "color": "red"}
    assert given.completed(defaults) == Bicycle(
        name="x", kind="road", speeds=1, extras={"bell": 1, "lock": 3}
    )
