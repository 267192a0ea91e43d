"""scripts/compare_patterns: like with like, in points, and one sentence for what has none."""

from pathlib import Path

import pytest
from scipy import stats

from tests.report.recovery_runs import Runs
from tests.run_script import refusal, run_script

SA_16, SWA_16 = "sa:window=16,seed=0", "swa:window=16"


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    found = Runs(tmp_path / "run")
    found.add("full", "boolq", [1, 1, 1, 0, 1], 1.0)
    found.add(SA_16, "boolq", [1, 0, 1, 0, 0], 0.5)
    return found


@pytest.fixture
def table(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> "Table":
    return Table(runs, monkeypatch, capfd)


class Table:
    def __init__(
        self, runs: Runs, patch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self._runs, self._patch, self._capfd = runs, patch, capfd

    def rows(self) -> dict[tuple[str, str, str], list[str]]:
        """The other columns, by task, A and B; what is left out stays in `err`."""
        path = str(self._runs.builder.write())
        assert run_script("compare_patterns", [path], self._patch) == 0
        out, self.err = self._capfd.readouterr()
        cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in out.splitlines()[2:]]
        found = {(task, a, b): [count, *rest] for task, count, a, b, *rest in cells}
        assert len(found) == len(cells)
        return found

    def refusal(self) -> str:
        path = str(self._runs.builder.write())
        return refusal("compare_patterns", [path], self._patch, self._capfd)


def test_the_interval_is_that_of_paired_t_test(table: Table) -> None:
    ((count, points, mean, interval, *_),) = table.rows().values()
    expected = stats.ttest_rel([1, 0, 1, 0, 0], [1, 1, 1, 0, 1]).confidence_interval(0.95)
    assert (count, points, mean) == ("5", "40.0", "-40.0")
    assert interval == f"{100 * expected.low:+.1f} to {100 * expected.high:+.1f}"


def test_the_pair_is_of_equal_windows_layers_and_decoding(runs: Runs, table: Table) -> None:
    runs.add(SWA_16, "boolq", [0, 0, 1, 0, 0], 0.5)
    runs.add("swa:window=32", "boolq", [1, 1, 1, 1, 1], 0.5)
    few = {"layers": [0, 1]}
    runs.add(SWA_16, "boolq", [1, 1, 1, 0, 0], 0.5, **few)
    runs.add(SA_16, "boolq", [1, 1, 1, 1, 0], 0.5, **few)
    named = ", layers [0, 1]"
    rows = table.rows()
    assert {(a, b): row[2] for (_, a, b), row in rows.items() if b != "full"} == {
        (SA_16, SWA_16): "+20.0",
        (SA_16 + named, SWA_16 + named): "+20.0",
    }
    assert sum(b == "full" for _, _, b in rows) == 5

    runs.add("sa:window=32,seed=0", "boolq", [1, 1, 1, 1, 1], 0.5, decode="pattern")
    assert not any(b == "swa:window=32" for _, _, b in table.rows())


def test_a_score_that_is_no_mean_over_items_is_left_out_and_named(runs: Runs, table: Table) -> None:
    task = "stdlib_perplexity"
    for pattern, value in (("full", 8.0), (SA_16, 9.0)):
        name = runs.builder.add(pattern, task, value)
        runs.builder.files[name]["items"] = {task: [-2.0, -2.2]}
    assert {of for of, _, _ in table.rows()} == {"boolq"}
    assert f"left out: {task}: word_perplexity,none is no mean over items\n" in table.err


def test_a_torn_file_is_left_out_and_named(runs: Runs, table: Table) -> None:
    torn = runs.builder.write() / "cells" / "0123456789abcdef.json"
    torn.write_text("{")
    assert len(table.rows()) == 1 and f"left out: {torn}: torn" in table.err


def test_several_models_are_refused(runs: Runs, table: Table) -> None:
    runs.add(SA_16, "boolq", [0, 0, 0, 0, 0], 0.5, model="sha256:" + "cd" * 32)
    assert "cells of one model" in table.refusal()


def test_several_results_of_one_pattern_are_refused(runs: Runs, table: Table) -> None:
    runs.add("full", "boolq", [1, 1, 1, 1, 1], 1.0, limit=5)
    assert "full has several results on boolq" in table.refusal()


def test_unequal_items_are_refused(runs: Runs, table: Table) -> None:
    runs.add(SWA_16, "boolq", [0, 0, 1], 0.5, limit=3)
    assert f"{SA_16} and {SWA_16} were run on different numbers of items" in table.refusal()


def test_one_item_gives_no_interval(runs: Runs, table: Table) -> None:
    runs.add("full", "arc_easy", [1], 1.0)
    runs.add(SA_16, "arc_easy", [1], 0.5)
    assert "arc_easy has one item" in table.refusal()


def test_cells_without_item_scores_are_refused(runs: Runs, table: Table) -> None:
    runs.builder.add(SWA_16, "boolq", 0.5)
    assert "holds no scores of single items" in table.refusal()


def test_nothing_to_compare_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = Runs(tmp_path / "alone")
    alone.add(SA_16, "boolq", [1, 0], 0.5)
    said = Table(alone, monkeypatch, capfd).refusal()
    assert "holds no two patterns to compare" in said and "it needs full" in said
