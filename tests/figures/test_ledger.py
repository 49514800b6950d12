"""The pictures of the ledger and of memorization hold the numbers that they were given."""

import numpy as np
import pytest

from mini_symposium.claims.registration import REGISTERED
from mini_symposium.claims.verdicts import (
    DEPENDS,
    INCONCLUSIVE,
    NOT_SUPPORTED,
    OUT_OF_REACH,
    SUPPORTED,
    Answer,
    Claim,
)
from mini_symposium.errors import InputError
from mini_symposium.figures.ledger import MARKS, ledger_picture, memorization_curves
from mini_symposium.run import Training


def training(learning_rate=1e-4, seed=42, ems=(0.2, 0.6), **more):
    """A training on four rows, whose EM in epoch k is ems[k]."""
    table = [[em] * 4 for em in ems]
    return Training("high", seed, learning_rate, 16, 32, "constant", len(ems), em=table, loss=table, **more)


def curves(axes) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.lines]


def test_em_is_drawn_at_the_middle_of_its_epoch_and_twins_between_epochs():
    picture = memorization_curves([training(twins={0: {"em": 0.1}, 2: {"em": 0.3}})], "proxy")
    by_epoch, by_dose = picture.axes
    assert curves(by_epoch) == [[0.2, 0.6], [0.1, 0.3]]
    assert curves(by_dose) == [[0.2, 0.6], [0.3]]  # a log axis has no place for dose 0
    np.testing.assert_allclose(by_dose.lines[0].get_xdata(), [2e-4, 6e-4])
    np.testing.assert_allclose(by_dose.lines[1].get_xdata(), [8e-4])
    assert list(picture.drawn["rows"]) == ["training", "training", "twins", "twins"]


def test_extractable_rows_are_averaged_where_they_are_long_enough():
    table = [[None, None, None, None], [None, True, False, True]]
    picture = memorization_curves([training(extractable_32=table)], "proxy")
    dotted = next(line for line in picture.axes[0].lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(dotted.get_ydata(), [np.nan, 2 / 3])
    assert "Dotted" in picture.texts[1].get_text()
    assert "Dotted" not in memorization_curves([training()], "proxy").texts[1].get_text()


def test_seeds_of_a_rate_look_the_same_rates_differ_without_colour_and_the_legend_names_each_once():
    several = [training(rate, seed, twins={1: {"em": 0.3}}) for rate, seed in ((1e-5, 42), (1e-4, 42), (1e-4, 43))]
    lines = memorization_curves(several, "proxy").axes[0].lines
    low, high, other = ((line.get_color(), line.get_linestyle()) for line in lines[::2])
    assert high == other and all(a != b for a, b in zip(high, low, strict=True))
    low, high, other = (line.get_marker() for line in lines[1::2])
    assert high == other != low
    legend = memorization_curves(several, "proxy").axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["LR 1e-4", "LR 1e-5", "twins"]


def test_a_comparison_that_a_model_lacks_is_not_measured_there():
    both = [answer("C6", 0.3, 0.2, 0.4, "supported"), answer("C6", -0.4, -0.6, -0.2, "not supported", 1)]
    models = {name: [claim("C6", "depends", *some)] for name, some in (("whole", both), ("half", both[:1]))}
    drawn = ledger_picture(models, "").drawn.set_index("model")["value"]
    assert drawn["whole"].tolist() == [0.3, -0.4] and drawn["half"].tolist()[0] == 0.3
    assert drawn["half"].isna().tolist() == [False, True]


def test_a_run_without_a_whole_epoch_is_refused():
    with pytest.raises(InputError, match="no epoch is complete"):
        memorization_curves([training(ems=())], "proxy")


def claim(key, verdict, *answers, **more):
    first = answers[0].value if answers else more.pop("value", None)
    return Claim(key, "it recites", "recall", verdict, "proxy", value=first, answers=list(answers), **more)


def answer(key, value, low, high, verdict, place=0):
    test, ends = REGISTERED.questions[key].tests[place], {"interval": (low, high), "corrected": (low - 0.1, high + 0.1)}
    return Answer(test.metric, test.equal, test.threshold, verdict=verdict, value=value, **ends)


LEDGER = [
    claim("C1", SUPPORTED, answer("C1", 0.9, 0.8, 1.0, SUPPORTED)),
    claim("C2", NOT_SUPPORTED, answer("C2", 0.2, 0.1, 0.3, NOT_SUPPORTED), exploratory=True),
    claim("C7", DEPENDS, answer("C7", 3.0, 2, 4, SUPPORTED), answer("C7", -3.0, -4, -2, NOT_SUPPORTED, 2)),
    claim("C6", INCONCLUSIVE, answer("C6", 0.36, 0.33, 0.39, SUPPORTED)),
    claim("C4", INCONCLUSIVE),
    claim("C10", OUT_OF_REACH, value=6.5),
]


def test_each_row_shows_its_number_both_intervals_and_the_threshold_or_says_why_not():
    picture = ledger_picture(LEDGER, "proxy")
    answers = [(row, each) for row in LEDGER for each in row.answers]
    for axes, (row, each) in zip(picture.axes, answers, strict=False):
        test = next(t for t in REGISTERED.questions[row.id].tests if (t.metric, t.equal) == (each.metric, each.equal))
        threshold, corrected, interval, mark = axes.lines
        assert threshold.get_xdata()[0] == each.threshold
        assert list(corrected.get_xdata()) == list(each.corrected)
        assert (list(interval.get_xdata()), interval.get_marker()) == (list(each.interval), "|")
        said = each.verdict if row.verdict == DEPENDS else row.verdict
        assert (mark.get_xdata()[0], mark.get_marker(), mark.get_color()) == (each.value, *MARKS[said])
        assert (mark.get_markerfacecolor() == "white") == row.exploratory
        low, high = axes.get_xlim()
        assert low < min(each.corrected) and high > max(each.corrected)
        [side] = axes.patches  # shaded: where the claim is supported
        supported = (each.threshold, high) if test.above else (each.threshold, low)
        assert (side.get_x(), side.get_x() + side.get_width()) == pytest.approx(supported)
        assert axes.get_xticklabels()[0].get_text().strip("← →") == test.rule
    shares, more_shares, em, nats, more_em = (axes.get_xlim() for axes in picture.axes[:5])
    assert shares == more_shares != em == more_em != nats
    units = [axes.texts[0].get_text() for axes in picture.axes[:5]]
    assert units == ["share", "share", "mean of a row's tokens", "nats a token", "mean of a row's tokens"]
    said = [axes.texts[-1].get_text() for axes in picture.axes]
    assert said[1:4] == [
        "not supported (exploratory)\n0.2 [0.1, 0.3]",
        "depends\n3 [2, 4], equal dose",
        "-3 [-4, -2], equal training loss",
    ]
    assert said[4:] == [
        "inconclusive\n0.36 [0.33, 0.39], equal epochs",
        "not measured",
        f"{OUT_OF_REACH}\n6.5",
    ]
    names = [axes.get_yticklabels()[0].get_text() for axes in picture.axes]
    assert names[0] == "C1  it recites\nrecall of the training rows"
    assert names[3] == "twins' loss, cosine and linear minus constant at equal training loss"
    assert list(picture.drawn["claim"]) == [row.verdict for row in LEDGER for _ in row.answers or [row]]
    assert picture.drawn["low"].isna().tolist() == [False] * 5 + [True] * 2
