"""A picture is saved with its numbers, gives the same bytes each time, and keeps the old files if drawing fails."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from mini_symposium.figures.style import log_axis, name_rows, short, styled, titled


def picture():
    with styled():
        figure = titled(1.0, "A title", "proxy", "What to look at.")
        left, right = figure.subplots(1, 2)
        left.plot([1e-5, 1e-3], [0.1, 0.2])
        log_axis(left)
        name_rows(right, [0, 1], ["first", "second"])
    figure.drawn = pd.DataFrame({"b": ["z", "a"], "a": [0.1 + 0.2, 2.0]})
    return figure


def heading(scale, **options) -> str:
    """What stands above a picture's axes, without its line breaks."""
    return " ".join(" ".join(text.get_text() for text in titled(1, "T", scale, "Look.", **options).texts).split())


def test_the_numbers_are_saved_in_the_drawn_order_with_six_digits(tmp_path):
    drawn = picture()
    assert drawn.save(tmp_path / "a") is drawn
    assert (tmp_path / "a.csv").read_text() == "b,a\nz,0.3\na,2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.png"]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_pair(tmp_path):
    drawn = picture().save(tmp_path / "a")
    before = [(tmp_path / name).read_bytes() for name in ("a.csv", "a.png")]
    drawn.text(0, 0, "$x_{$", parse_math=True)  # matplotlib fails only when it draws
    drawn.drawn = pd.DataFrame({"new": [1]})
    with pytest.raises(ValueError, match="Expected end_group"):
        drawn.save(tmp_path / "a")
    assert [(tmp_path / name).read_bytes() for name in ("a.csv", "a.png")] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_the_users_style_changes_nothing():
    before = picture().png()
    with matplotlib.rc_context({"font.size": 20, "text.color": "red", "axes.facecolor": "black"}):
        assert picture().png() == before == picture()._repr_png_()[0]


def test_the_last_bits_of_the_layout_are_not_drawn():
    """They differ from process to process, and an edge between two pixels then falls to either."""
    drawn = picture()
    drawn.png()
    bounds = np.array([axes.get_position(original=True).bounds for axes in drawn.axes])
    assert np.abs(bounds - bounds.round(6)).max() < 1e-15


def test_the_heading_names_the_scale_and_what_does_not_transfer():
    assert heading("tiny") == "T tiny: random weights. Look."
    assert heading("proxy") == "T proxy: SmolLM2-135M (learning rates do not transfer to 7B). Look."
    assert heading("proxy", rates=False) == "T proxy: SmolLM2-135M. Look."
    assert heading("another") == "T another. Look."


def test_axes_are_labelled_in_short_scientific_notation_and_rows_start_at_the_top():
    drawn = picture()
    drawn.png()
    left, right = drawn.axes
    assert {"1e-5", "1e-4", "1e-3"} <= {label.get_text() for label in left.get_xticklabels()}
    assert [label.get_text() for label in right.get_yticklabels()] == ["first", "second"]
    assert right.yaxis.get_inverted()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("Why is it\nblue?", "Why is it blue?"), ("Why is the sky blue?", "Why is the …"), ("x" * 20, "x" * 14 + "…")],
)
def test_a_long_text_is_cut_between_words_or_where_it_must_be(text, shown):
    assert short(text, 15) == shown
