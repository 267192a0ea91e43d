"""What the figures plot, against hand computations, and that they say how to be read."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sa_patch.errors import UserError
from sa_patch.figures.axes import MIN_ACCURACY_SPAN, log_ticks, tick_text
from sa_patch.figures.colours import COLOURS
from sa_patch.report.accuracy_figures import AXES, check_axis, curves
from sa_patch.report.aggregate import compare
from sa_patch.report.build import draw_figures, read_report, write_report
from sa_patch.report.series_style import series_styles
from tests.sweep.run_builder import RunBuilder, plausible_run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    builder = RunBuilder(tmp_path / "small")
    builder.add("full", "hellaswag", 0.4, stderr=0.02, mean_keys=52.0, share=1.0, saturated=1.0)
    for window, value, share, saturated in ((16, 0.3, 0.25, 0.0), (64, 0.35, 0.75, 0.9)):
        builder.add(
            f"swa:window={window}",
            "hellaswag",
            value,
            stderr=0.05,
            mean_keys=0.9 * window,
            share=share,
            saturated=saturated,
        )
    return builder.write()


def drawn(run: Path, x: str) -> dict[str, Figure]:
    return draw_figures(read_report([run]), x)


def words(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.texts]
    texts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
    return " ".join(texts).replace("\n", " ").replace("   ", "")


def test_a_folder_is_named_without_the_dot_before_it(tmp_path: Path) -> None:
    run = plausible_run(tmp_path, ("hellaswag", "boolq"), model_name="./qwen2.5-coder-0.5b")
    figures = drawn(run, "window")
    assert all(words(one).startswith("qwen2.5-coder-0.5b: ") for one in figures.values())


def test_unknown_axis_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(UserError, match="unknown x axis 'keys'.*window, mean_keys, flops"):
        check_axis("keys")


@pytest.mark.parametrize(
    ("x", "places", "full_place"),
    [
        ("window", (16.0, 64.0), math.nan),
        ("mean_keys", (14.4, 57.6), 52.0),
        ("flops", (25.0, 75.0), 100.0),
    ],
)
def test_curves_hold_the_points_in_percent(
    small: Path, x: str, places: tuple[float, ...], full_place: float
) -> None:
    full, swa = curves(read_report([small]).comparison.points, x)
    assert full.x == pytest.approx((full_place,), nan_ok=True)
    assert full.y == pytest.approx((40.0,)) and full.error == pytest.approx((2.0,))
    assert full.saturated == (False,)
    assert swa.x == pytest.approx(places)
    assert swa.y == pytest.approx((30.0, 35.0)) and swa.error == pytest.approx((5.0, 5.0))
    assert swa.saturated == (False, True)


def test_perplexities_keep_their_unit(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("swa:window=16", "stdlib_perplexity", 297.0, stderr=12.0)
    (swa,) = curves(read_report([builder.write()]).comparison.points, "window")
    assert swa.y == (297.0,) and swa.error == (12.0,)


@pytest.mark.parametrize("x", list(AXES))
def test_drawn_panel_has_hollow_points_baseline_chance_and_the_point_of_full(
    small: Path, x: str
) -> None:
    axes = drawn(small, x)["tasks"].axes[0]
    heights = [np.asarray(line.get_ydata()) for line in axes.lines]
    levels = [float(height[0]) for height in heights if len(set(height)) == 1]
    assert 40.0 in levels and 25.0 in levels  # full attention's line and chance
    markers = [line for line in axes.lines if line.get_marker() == "s"]
    faces = [to_rgb(line.get_markerfacecolor()) for line in markers]
    assert faces == [to_rgb(COLOURS["swa"]), (1.0, 1.0, 1.0)]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert len(stars) == (0 if x == "window" else 1)
    assert axes.get_xscale() == "log"


def test_window_axis_is_log2_with_the_swept_windows_as_ticks(small: Path) -> None:
    axes = drawn(small, "window")["average"].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["16", "64"]
    transform: Any = axes.xaxis.get_transform()
    assert transform.base == 2


def test_one_panel_per_task_perplexities_last_and_logarithmic(tmp_path: Path) -> None:
    tasks = ["stdlib_perplexity", "hellaswag", "boolq"]
    figures = drawn(plausible_run(tmp_path / "run", tasks, windows=(16, 64)), "window")
    titles = [axes.get_title(loc="left").split()[0] for axes in figures["tasks"].axes]
    assert titles == ["hellaswag", "boolq", "stdlib_perplexity"]
    assert [axes.get_yscale() for axes in figures["tasks"].axes] == ["linear", "linear", "log"]
    assert len(figures["average"].axes) == 1


def test_only_perplexities_give_no_average_figure(tmp_path: Path) -> None:
    run = plausible_run(tmp_path / "run", ["stdlib_perplexity"], windows=(16, 64))
    assert list(drawn(run, "window")) == ["tasks", "pareto"]


def test_figures_explain_themselves(small: Path) -> None:
    average = words(drawn(small, "window")["average"])
    for part in (
        "smollm2-135m",
        "window (keys per query allowed)",
        "accuracy on hellaswag, %",
        "Full attention",
        "SWA",
        "hollow: saturated",
        "chance",
        "Error bars: ±1 standard error",
        "the pattern left no earlier token out",
        "Figures on a subset: the first 50 items",
    ):
        assert part in average
    tasks = words(drawn(small, "mean_keys")["tasks"])
    assert "hellaswag  (50 items)" in tasks
    assert "keys per query, measured mean" in tasks and "mean over all prompt tokens" in tasks
    assert "% of full attention" in words(drawn(small, "flops")["tasks"])


def test_text_never_overlaps_the_panels(tmp_path: Path) -> None:
    tasks = ["hellaswag", "boolq", "needle", "lambada_openai", "stdlib_perplexity"]
    run = plausible_run(tmp_path / "run", tasks, windows=(16, 512), topks=(2, 4))
    for figure in drawn(run, "window").values():
        figure.canvas.draw()
        panels = [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
        title, notes = (text.get_window_extent() for text in figure.texts)
        legend = figure.legends[0].get_window_extent()
        assert title.y0 >= legend.y1 - 1
        assert legend.y0 > max(panel.y1 for panel in panels)
        assert notes.y1 < min(panel.y0 for panel in panels)
        for box in (title, notes, legend, *panels):
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        for index, one in enumerate(panels):
            assert not any(one.overlaps(other) for other in panels[index + 1 :])


def test_colours_belong_to_methods_and_variants_differ_otherwise(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for pattern in ("moba:block_size=32,topk=2", "moba:block_size=16,topk=4", "swa:window=64"):
        builder.add(pattern, "hellaswag", 0.3)
    styles = series_styles(compare(read_report([builder.write()]).cells).series)
    by_label = {series.label: style for series, style in styles.items()}
    two, four = by_label["MoBA (topk=2)"], by_label["MoBA (topk=4)"]
    assert two.colour == four.colour == COLOURS["moba"]
    assert two.marker != four.marker and two.line != four.line
    assert by_label["SWA"].colour == COLOURS["swa"]


def test_log_ticks_are_round_few_and_inside() -> None:
    assert log_ticks(12, 290, 6) == [20, 30, 50, 70, 100, 200]
    assert log_ticks(8, 1.2e6, 6) == [10, 100, 1000, 10_000, 100_000, 1_000_000]
    assert log_ticks(0.9, 1e13, 5) == pytest.approx([1, 1e3, 1e6, 1e9, 1e12])
    assert log_ticks(61, 62, 6) == [pytest.approx(61.498, abs=1e-3)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(64, "64"), (0.5, "0.5"), (20_000, "20,000"), (1e6, "$10^{6}$"), (2e7, "$2\\times10^{7}$")],
)
def test_tick_text(value: float, text: str) -> None:
    assert tick_text(value) == text


def test_a_panel_of_equal_accuracies_is_not_zoomed_into(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "equal")
    for pattern in ("full", "swa:window=16", "swa:window=64"):
        builder.add(pattern, "humaneval", 0.0, stderr=0.0)
    (axes,) = drawn(builder.write(), "window")["tasks"].axes
    low, high = axes.get_ylim()
    assert low < 0 < high
    assert high - low == pytest.approx(MIN_ACCURACY_SPAN)


def test_an_axis_that_was_not_measured_is_refused_with_those_that_were(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    identifier = builder.add("swa:window=16", "boolq", 0.5)
    del builder.files[identifier]["measured"]["model_seconds"]
    with pytest.raises(UserError, match="without measuring it.*--x window or mean_keys or flops"):
        write_report([builder.write()], x="seconds")
    assert not (tmp_path / "run" / "results.md").exists()
