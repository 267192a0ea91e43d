"""The Pareto figure and the figure of accuracy by depth."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sa_patch.report.build import draw_figures, read_report, write_report
from sa_patch.report.pareto_figure import FRONTIER, frontier
from sa_patch.report.series_style import series_styles
from tests.sweep.run_builder import RunBuilder, plausible_run

POINTS = st.lists(
    st.tuples(st.integers(1, 6).map(float), st.integers(0, 6).map(float)), min_size=1, max_size=12
)


@given(points=POINTS, higher=st.booleans())
def test_the_frontier_is_what_nothing_beats(
    points: list[tuple[float, float]], higher: bool
) -> None:
    sign = 1.0 if higher else -1.0

    def beaten(one: tuple[float, float]) -> bool:
        return any(
            cost <= one[0] and sign * score >= sign * one[1] and (cost, score) != one
            for cost, score in points
        )

    assert frontier(points, higher) == sorted({point for point in points if not beaten(point)})


def draw(run: Path, x: str = "window") -> dict[str, Figure]:
    return draw_figures(read_report([run]), x)


def staircase(figure: Figure, panel: int = 0) -> list[tuple[float, float]]:
    (line,) = [line for line in figure.axes[panel].lines if line.get_color() == FRONTIER]
    assert line.get_drawstyle() == "steps-post"
    return list(zip(*(np.asarray(data, float) for data in line.get_data()), strict=True))


@pytest.fixture
def rivals(tmp_path: Path) -> Path:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "hellaswag", 0.4, mean_keys=52.0, share=1.0, saturated=1.0)
    for pattern, value, keys, share in (
        ("swa:window=16", 0.30, 10.0, 0.20),
        ("swa:window=64", 0.33, 40.0, 0.80),
        ("moba:block_size=8,topk=2", 0.34, 12.0, 0.90),
    ):
        builder.add(pattern, "hellaswag", value, mean_keys=keys, share=share)
    return builder.write()


def test_the_frontier_leaves_full_attention_out_and_goes_on_to_the_right(rivals: Path) -> None:
    figure = draw(rivals)["pareto"]
    stairs = staircase(figure)
    assert np.allclose(stairs[:2], [(10.0, 30.0), (12.0, 34.0)])
    assert np.allclose(stairs[2], (figure.axes[0].get_xlim()[1], 34.0))
    drawn = (np.asarray(line.get_ydata()) for line in figure.axes[0].lines)
    levels = {float(heights[0]) for heights in drawn if len(heights)}
    assert 40.0 in levels and 25.0 in levels  # full attention and chance


def test_by_flops_another_method_may_be_best(rivals: Path) -> None:
    stairs = staircase(draw(rivals, "flops")["pareto"])
    expected = [(20.0, 30.0), (80.0, 33.0), (90.0, 34.0)]
    assert stairs[:3] == [pytest.approx(pair) for pair in expected]


def test_of_perplexities_the_lowest_are_best(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for window, value in ((16, 20.0), (32, 25.0), (64, 12.0)):
        builder.add(f"swa:window={window}", "stdlib_perplexity", value, mean_keys=float(window))
    assert staircase(draw(builder.write())["pareto"])[:2] == [(16.0, 20.0), (64.0, 12.0)]


def test_the_average_comes_first_and_every_task_has_a_panel(tmp_path: Path) -> None:
    tasks = ["stdlib_perplexity", "hellaswag", "boolq"]
    figure = draw(plausible_run(tmp_path / "run", tasks, windows=(16, 64)))["pareto"]
    titles = [axes.get_title(loc="left").split("  ")[0] for axes in figure.axes]
    assert titles == ["average over 2 tasks", "hellaswag", "boolq", "stdlib_perplexity"]
    for panel in range(4):
        assert staircase(figure, panel)


def test_files_are_named_by_their_axis(rivals: Path) -> None:
    names = {
        path.name for x in ("mean_keys", "flops") for path in write_report([rivals], x=x).figures
    }
    assert {"pareto.png", "pareto.svg", "pareto_vs_flops.png", "pareto_vs_flops.svg"} <= names


def test_twenty_series_look_different(tmp_path: Path) -> None:
    extra = [
        f"sinks:size={size}+{part}"
        for size in (2, 4, 8, 16)
        for part in ("swa:window=9", "sa:window=9,seed=0", "psa:window=9,seed=0")
    ]
    extra += [f"block_topk:block_size=4,topk=4,sinks={size},local=8" for size in range(7)]
    builder = RunBuilder(tmp_path / "run")
    for text in ("full", "swa:window=9", *extra):
        method = "union" if "+" in text else text.split(":")[0]
        builder.add(text, "hellaswag", 0.3, window=16, method=method)
    styles = series_styles(read_report([builder.write()]).comparison.series)
    assert len(styles) == 21 and len(set(styles.values())) == 21


def depths(values: dict[int, float]) -> dict[str, float]:
    return {f"acc_depth_{depth},none": value for depth, value in values.items()}


def test_depths_are_means_over_seeds_in_rows_by_method_and_window(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "needle", 1.0, scores=depths({10: 1.0, 90: 0.9}))
    for seed, low in ((0, 0.2), (1, 0.4)):
        builder.add(f"sa:window=16,seed={seed}", "needle", 0.3, scores=depths({10: low, 90: 0.5}))
    builder.add("swa:window=16", "needle", 0.3, scores=depths({90: 0.7}))
    builder.add("swa:window=16", "boolq", 0.3)
    (axes,) = draw(builder.write())["depth"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "Full attention", "SA  @16", "SWA  @16",
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "90"]
    shown = np.asarray(axes.images[0].get_array(), float)
    np.testing.assert_allclose(shown, [[1.0, 0.9], [0.3, 0.5], [np.nan, 0.7]])
    assert [text.get_text() for text in axes.texts] == ["100", "90", "30", "50", "70"]


def test_a_seed_without_a_depth_gives_no_mean_there(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("sa:window=16,seed=0", "needle", 0.3, scores=depths({10: 0.2, 90: 0.5}))
    builder.add("sa:window=16,seed=1", "needle", 0.3, scores=depths({90: 0.7}))
    (point,) = read_report([builder.write()]).comparison.points
    assert np.allclose(point.by_depth, [(90, 0.6)])


def test_text_of_the_new_figures_never_overlaps_the_panels(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for task in ("needle", "boolq"):
        for text in ("full", "swa:window=16", "sinks:size=4+swa:window=60+sa:window=64,seed=0"):
            method = "union" if "+" in text else text.split(":")[0]
            builder.add(text, task, 0.3, method=method, scores=depths({10: 0.2, 50: 0.5}))
    figures = draw(builder.write())
    for name in ("pareto", "depth"):
        figure = figures[name]
        figure.canvas.draw()
        panels = [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
        title, notes = (text.get_window_extent() for text in figure.texts)
        assert title.y0 > max(panel.y1 for panel in panels)
        assert notes.y1 < min(panel.y0 for panel in panels)
        for box in (title, notes, *panels):
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        for index, one in enumerate(panels):
            assert not any(one.overlaps(other) for other in panels[index + 1 :])
