"""The figure of layers: every point where its table says, every name beside its point."""

import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError
from loopscope.figures import style
from loopscope.figures.tag_placement import Tag, place_tags
from loopscope.training.runs import read_runs
from tests.training_runs import add, example, lines_of, note_of, points


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return example(tmp_path_factory.mktemp("runs"))


def bars(fig) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in fig.axes[0].containers}


def whiskers(container: ErrorbarContainer) -> list[list[list[float]]]:
    (lines,) = [c for c in container[2] if isinstance(c, LineCollection)]
    return [segment.tolist() for segment in lines.get_segments()]


def plain(layers: int) -> int:
    """Non-embedding parameters at D = 32: layers and the final norm."""
    return layers * (12 * 32**2 + 13 * 32) + 2 * 32


def test_perplexities_stand_at_their_parameters_with_the_range_over_seeds(tables):
    fig = figures.layers(tables)
    drawn = bars(fig)
    assert list(drawn) == ["vanilla", "base", "+mesh"]  # the order of the paper
    expected = [
        [plain(4), (math.exp(3.0) + math.exp(3.6) + math.exp(3.3)) / 3],
        [plain(6), math.exp(2.5)],
    ]
    assert points(drawn["base"][0]) == [pytest.approx(p, rel=1e-12) for p in expected]
    assert points(drawn["vanilla"][0]) == [pytest.approx([plain(8), math.exp(2)])]
    assert points(drawn["+mesh"][0]) == [[plain(4) + 4 * 2 * 6 * 33, math.exp(2.75)]]
    first, second = whiskers(drawn["base"])
    assert np.array(first)[:, 1].tolist() == pytest.approx([math.exp(3.0), math.exp(3.6)])
    assert np.array(second)[:, 1].tolist() == pytest.approx([math.exp(2.5)] * 2)
    ax = fig.axes[0]
    low, high = ax.get_ylim()
    assert low < math.exp(2) and high > math.exp(3.6)
    assert ax.get_xlabel() == "non-embedding parameters" and ax.get_xscale() == "linear"
    assert ax.get_ylabel() == "validation perplexity\nat the end of training"
    assert drawn["base"][0].get_linestyle() == "-" and drawn["+mesh"][0].get_linestyle() == "None"
    note = note_of(fig)
    assert "whiskers least to greatest; n = 1 to 3 seeds per point." in note
    assert "Left out: 1 unfinished run." in note and "moved sideways" in note


def test_the_same_variant_has_the_same_colour_in_both_figures(tables):
    curves = lines_of(figures.training(tables).axes[0])
    drawn = bars(figures.layers(tables))
    for label, container in drawn.items():
        (line,) = [line for text, line in curves.items() if text.split("  ")[0] == label]
        assert line.get_color() == container[0].get_color()
        assert line.get_marker() == container[0].get_marker()


def test_every_point_has_its_layout_beside_it(tables):
    fig = figures.layers(tables, ["base-0", "base-1", "deep", "vanilla"])
    texts = {text.get_text(): text for text in fig.axes[0].texts}
    assert set(texts) == {"1+2R3+1", "1+3R2+2", "1+2+2+2+1"}
    places = {
        "1+2R3+1": (plain(4), (math.exp(3) + math.exp(3.6)) / 2),
        "1+3R2+2": (plain(6), math.exp(2.5)),
        "1+2+2+2+1": (plain(8), math.exp(2)),
    }
    fig.draw_without_rendering()
    to_pixels = fig.axes[0].transData.transform
    for text, artist in texts.items():
        assert artist.arrow_patch is None  # close by, where there is room
        box = artist.get_window_extent()
        centre = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        far = {t: np.hypot(*(to_pixels(p) - centre)) for t, p in places.items()}
        assert min(far, key=lambda t: far[t]) == text


def test_names_of_points_cover_neither_each_other_nor_markers(tmp_path):
    for number, layout in enumerate(["1+1R3+1", "1+2R3+1", "2+2R3+2", "2+4R3+2"]):
        for rise, variant in enumerate(["base", "residual", "anchor", "mesh", "vanilla"]):
            end = 3.4 - 0.08 * number - 0.03 * rise
            add(tmp_path, f"{layout}-{variant}", variant, layout, losses={300: end})
    fig = figures.layers(read_runs([tmp_path]))
    ax = fig.axes[0]
    fig.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the leading lines
    assert len(boxes) >= 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = ax.get_window_extent()
    markers = [xy for c in ax.containers for xy in ax.transData.transform(points(c[0]))]
    assert len(markers) == 20
    for box in boxes:
        assert not any(box.contains(*xy) for xy in markers)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1


def placed(xy: list[tuple[float, float]]) -> tuple[list, object]:
    """Name points on a small page of 0 … 1; the boxes of the names and of the axes."""
    with style.style():
        fig = style.new_figure(3.0, 2.5)
        ax = fig.subplots()
        ax.set(xlim=(0, 1), ylim=(0, 1))
        tags = [Tag(text=f"1+{i}R3+1", x=x, y=y, low=y, high=y) for i, (x, y) in enumerate(xy)]
        place_tags(fig, ax, tags)
    fig.draw_without_rendering()
    texts = sorted(ax.texts, key=lambda text: text.get_text())
    return [Text.get_window_extent(text) for text in texts], ax.get_window_extent()


def test_names_at_the_edge_stay_inside():
    corners = [(0.03, 0.03), (0.97, 0.97), (0.5, 0.99), (0.99, 0.5), (0.5, 0.01), (0.01, 0.5)]
    boxes, frame = placed(corners)
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_names_in_a_crowd_do_not_cover_each_other():
    boxes, _ = placed([(0.5 + 0.04 * (i % 3), 0.5 + 0.04 * (i // 3)) for i in range(9)])
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_widely_different_sizes_get_a_logarithmic_axis_and_their_width(tmp_path):
    add(tmp_path, "narrow", "base")
    add(tmp_path, "wide", "base", widths={"d_model": 128}, lr=1e-3)
    fig = figures.layers(read_runs([tmp_path]))
    assert fig.axes[0].get_xscale() == "log"
    assert {t.get_text() for t in fig.axes[0].texts} == {
        "1+2R3+1, $D=32$", "1+2R3+1, $D=128$"
    }  # fmt: skip
    assert list(bars(fig)) == ["base"]
    assert "Runs differ in lr." in note_of(fig)


def test_runs_on_different_texts_are_never_joined(tmp_path):
    add(tmp_path, "a", "base", text="a" * 64)
    add(tmp_path, "b", "base", "1+3R3+1", text="b" * 64)
    fig = figures.layers(read_runs([tmp_path]))
    assert list(bars(fig)) == ["base, text=aaaaaa", "base, text=bbbbbb"]
    assert note_of(fig).endswith("differ in text or vocabulary: their losses do not compare.")
    add(tmp_path / "c", "c", "mesh", widths={"d_vocab": 128}, text="a" * 64)
    fig = figures.training(read_runs([tmp_path / "a", tmp_path / "c"]))
    assert "differ in text or vocabulary" in note_of(fig)


def test_the_layer_figure_needs_two_parameter_counts(tables):
    equal = "all finished runs have 50,880 non-embedding parameters"
    with pytest.raises(InputError, match=f"nothing to draw: {equal}"):
        figures.layers(tables, ["base-0", "base-1", "base-going"])
    with pytest.raises(InputError, match="nothing to draw: no run is finished"):
        figures.layers(tables, "base-going")
    _, missing = figures.plan(tables, ["base-0", "base-going"])
    assert [str(item) for item in missing] == [
        "fig8_layers, base-going: its training is unfinished (step 210 of 300)",
        f"fig8_layers: {equal}, and it compares at least two different counts",
    ]
