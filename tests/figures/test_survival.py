"""The picture of what survives storage: its numbers, its names, and the same bytes again from its csv."""

import numpy as np
import pandas as pd
import pytest

from mini_symposium.errors import InputError
from mini_symposium.figures.survival import survival_picture


def stored(storage, verdict, **more):
    row = {"storage": storage, "verdict": verdict, "cosine": 1 / 3, "relative_norm": 1.01, "noise": 0.2}
    return row | {"gain": 2 / 3, "kl_share": 0.1, "same": 0.5} | more


FOUND = {
    "storages": [stored("fp32", "kept", gain=1.44), stored("bf16", "blurred"), stored("NF4", "lost", gain=None)],
    "layers": [
        {"storage": name, "layer": f"layer {k}", "cosine": k / 7, "relative_norm": 1.0, "noise": 0.1}
        for name in ("fp32", "bf16", "NF4")
        for k in range(6)
    ],
}


def test_the_picture_is_drawn_from_the_results_and_again_from_its_csv(tmp_path):
    drawn = survival_picture(FOUND, "tiny").save(tmp_path / "survival")
    csv = pd.read_csv(tmp_path / "survival.csv")
    assert list(csv[csv["layer"] == "all"]["verdict"]) == ["kept", "blurred", "lost"]
    texts = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    assert texts == ["fp32: kept", "bf16: blurred", "NF4: lost"]
    again = survival_picture({"storages": csv.to_dict("records"), "layers": []}, "tiny")
    assert again.png() == (tmp_path / "survival.png").read_bytes()


def test_a_bar_ends_at_the_edge_and_its_number_is_written():
    axes = survival_picture(FOUND, "tiny").axes[1]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.3, 2 / 3, 0], abs=1e-6)
    assert [text.get_text() for text in axes.texts] == ["1.44", "0.67", "not measurable"]


def test_verdicts_differ_without_colour_and_a_unit_is_equally_long_in_every_panel():
    picture = survival_picture(FOUND, "tiny")
    weights, gain, answers = picture.axes
    assert [line.get_marker() for line in weights.lines] == ["o", "D", "X"]
    assert [bar.get_hatch() for bar in answers.patches] == ["", "///", "xxx"]
    picture.png()
    inches = [axes.get_position().width / np.ptp(axes.get_xlim()) for axes in (weights, gain, answers)]
    assert inches == pytest.approx([inches[0]] * 3, rel=0.01)


def test_nothing_measured_is_refused():
    with pytest.raises(InputError, match="no storage has been measured"):
        survival_picture({"storages": [], "layers": []}, "tiny")
