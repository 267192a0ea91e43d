"""Reports hold what was measured as JSON does; tests/cli/test_analyze.py draws their figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sa_patch.analysis.attention_maps import HeadInputs
from sa_patch.analysis.graphs.content_choices import random_content
from sa_patch.analysis.reports.attention import attention_report
from sa_patch.analysis.reports.cost import cost_report
from sa_patch.analysis.reports.figure_style import colours_of
from sa_patch.analysis.reports.graph import graph_report
from sa_patch.analysis.reports.propositions import propositions_report
from sa_patch.analysis.reports.receptive import receptive_report
from sa_patch.analysis.reports.report import Report, as_json, short, shown
from sa_patch.errors import UserError
from sa_patch.patterns import PSA, SA, SWA, ByHead, Full, MoBA, Sinks, parse_pattern
from tests.laws.drawn import METHODS, patterns


def attention() -> Report:
    content = random_content(24, 0, 0)
    inputs = HeadInputs(content.q, content.k, 0.125)
    methods = [Full(), SWA(4), SA(4), Sinks(2) | SWA(2), MoBA(4)]
    return attention_report(inputs, methods, 0, 0, {"model": "tiny", "prompt": "x"})


REPORTS: dict[str, Callable[[], Report]] = {
    "receptive": lambda: receptive_report([SA(4), SWA(1), PSA(3), Full()], 60, 12, 20, 10, 0),
    "graph": lambda: graph_report([SA(4), SWA(1), Sinks(2) | SWA(3), Full()], 40, 3, 20, 0),
    "propositions": lambda: propositions_report(40, [4, 8], 20, 10),
    "cost": lambda: cost_report([SA(4), MoBA(8), Full()], [64, 1024], 64, 2),
    "attention": attention,
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_json(name: str) -> None:
    report = REPORTS[name]()
    assert report.name == report.content["analysis"] == name
    text = json.dumps(report.content, allow_nan=False)
    assert json.loads(text) == report.content
    assert report.rows and all(len(row) == len(report.columns) for row in report.rows)


def test_a_notebook_shows_the_table_and_its_note() -> None:
    columns, rows = ("pattern", "keys", "kept"), [("swa:4", "3.5", "60%"), ("full", "12", "100%")]
    report = Report("x", {}, Figure(), columns, rows, "A note.")
    table = [
        "| pattern | keys | kept |",
        "| --- | ---: | ---: |",
        "| swa:4 | 3.5 | 60% |",
        "| full | 12 | 100% |",
    ]
    assert report._repr_markdown_().splitlines() == [*table, "", "A note."]
    assert dataclasses.replace(report, note="")._repr_markdown_().splitlines() == table


def test_receptive_report_measures_both_sides_and_predicts() -> None:
    found = receptive_report([SWA(5), PSA(3)], 41, 30, 41, 0, 0).content["patterns"]
    sides = [(one["pattern"], one["causal"]) for one in found]
    assert sides == [("swa:window=5", True), ("psa:window=3,seed=0", True), ("swa:window=5", False)]
    swa = found[0]
    assert swa["layers_to"]["1.0"] == swa["predicted_layers_to_all"] == 10
    assert swa["last_query"] == swa["predicted_last_query"]
    assert found[1]["predicted_layers_to_all"] is None


def test_receptive_report_averages_over_draws() -> None:
    causal, both = receptive_report([SA(4)], 60, 60, 5, 30, 0).content["patterns"]
    for one in (causal, both):
        drawn = one["layers_to_all_over_draws"]
        assert drawn["draws"] == 30 and drawn["predicted"] == one["predicted_layers_to_all"]
        assert drawn["low"] <= drawn["predicted"] <= drawn["high"]


def test_graph_report_sets_the_ring_beside_its_closed_form() -> None:
    (found,) = graph_report([SA(4)], 100, 2, 50, 0).content["patterns"]
    assert found["spectral_gap"] == pytest.approx(found["spectral_gap_closed_form"], rel=1e-5)
    assert [one["layers"] for one in found["stacked"]] == [1, 2]
    assert found["stacked"][1]["edges"] > 1.5 * found["stacked"][0]["edges"]


def test_attention_report_keeps_what_falls_on_visible_keys() -> None:
    found = attention().content["patterns"]
    assert found[0]["weight_kept"] == 1 and found[0]["mean_keys"] == 12.5
    assert all(0 < one["weight_kept"] < 1 for one in found[1:])


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (lambda: receptive_report([SWA(4)], 20, 0, 5, 0, 0), "depth must be"),
        (lambda: receptive_report([SWA(4)], 20, 1, 5, 9, 0), "draws must be 0, or at least 10"),
        (lambda: graph_report([SWA(4)], 2, 1, 5, 0), "n must be a whole number of at least 3"),
        (lambda: graph_report([SWA(4)], 20, 1, 1, 0), "sample must be"),
        (lambda: graph_report([SWA(4)], 20, 0, 5, 0), "layers must be"),
    ],
)
def test_bad_numbers(report: Callable[[], Report], says: str) -> None:
    with pytest.raises(UserError, match=says):
        report()


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_short_names_read_back(method: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns(method))
    name = short(pattern)
    assert parse_pattern(name) == pattern and len(name) <= len(str(pattern))


def test_short_names() -> None:
    pattern = Sinks(4) | SWA(60) | SA(64, seed=3)
    assert short(pattern) == "sinks:4+swa:60+sa:64,seed=3"
    assert short(SA(64)) == "sa:64" and short(Full()) == "full"
    heads = ByHead((Full(), Sinks(4) | SWA(8), Sinks(4) | SWA(8), SA(9)))
    assert short(heads) == "heads{1*full|2*sinks:4+swa:8|1*sa:9}"
    assert parse_pattern(short(heads)) == heads


def test_patterns_by_head_are_named_in_every_table() -> None:
    heads = ByHead((Full(), Sinks(2) | SWA(3)))
    for report in (
        cost_report([heads], [64], 64, 1),
        graph_report([heads], 20, 1, 20, 0),
        receptive_report([heads], 20, 2, 20, 0, 0),
    ):
        assert report.rows[0][0] == "heads{1*full|1*sinks:2+swa:3}"


def test_as_json() -> None:
    @dataclasses.dataclass
    class Found:
        value: float
        several: Any

    given_value = {"a": Found(1 / 3, np.array([1.0, np.nan])), "b": (np.int64(3), SWA(4), None)}
    expected = {"a": {"value": 0.333333, "several": [1.0, None]}, "b": [3, "swa:window=4", None]}
    assert as_json(given_value) == expected
    assert as_json(1 / 3, 2) == 0.33 and as_json(True) is True and as_json(float("inf")) is None


def test_shown() -> None:
    assert [shown(x) for x in (None, float("nan"), 3, 2.0, 0.12345, 1234.5, 2.5e9)] == [
        *("-", "-", "3", "2", "0.123", "1,234", "2.5e+09")
    ]


def test_each_pattern_has_a_colour_of_its_own() -> None:
    many = [Full(), SA(4), SA(8), SWA(4), Sinks(2) | SWA(3), Sinks(2) | SA(3), PSA(4), MoBA(4)]
    colours = colours_of(many)
    assert len(set(colours)) == len(many) and colours == colours_of(many)
