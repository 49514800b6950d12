import numpy as np
import pytest

from mini_symposium import figures
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import Curve


def curve(rate, best, epochs):
    epoch = np.arange(epochs + 1)
    rows = np.array([-1.0, 0.0, 0.5, 2.0])
    loss = 3 + ((epoch - best) / best)[:, None] ** 2 * (1 + 0.1 * rows) + rows
    em = np.minimum(epoch[:-1] / (2.2 * best), 1)
    return Curve(rate, 4, 9, loss.tolist(), loss.tolist(), em.tolist(), em.tolist())


def test_the_lines_are_the_curves_and_the_dots_their_best_epochs():
    curves = {1e-4: curve(1e-4, 6, 16), 1e-5: curve(1e-5, 20, 30)}
    picture = figures.overfitting(curves, "proxy")
    drawn = picture.drawn
    assert list(drawn["learning_rate"].unique()) == [1e-4, 1e-5]
    for rate, each in curves.items():
        part = drawn[drawn["learning_rate"] == rate]
        assert part["loss"].tolist() == pytest.approx(list(each.means))
        assert part["dose"].tolist() == pytest.approx([epoch * 9 * rate for epoch in range(len(each.loss))])
        assert part["trained_em"].isna().sum() == 1
    dots = [line.get_xydata()[0].tolist() for line in picture.axes[1].lines if line.get_marker() == "o"]
    assert dots == [pytest.approx([6 * 9 * 1e-4, 3.375]), pytest.approx([20 * 9 * 1e-5, 3.375])]
    squares = [
        line for axes in picture.axes for line in axes.lines if line.get_marker() == "s" and len(line.get_xdata())
    ]
    assert len(squares) == 2  # 1e-4 recites within its curve, in both panels; 1e-5 does not
    texts = {text.get_text() for axes in picture.axes for text in axes.texts}
    assert {"epoch 6", "epoch 20", "LR 1e-4", "LR 1e-5"} <= texts
    assert picture.png() == figures.overfitting(curves, "proxy").png()


def test_without_a_curve_it_says_how_to_get_one():
    with pytest.raises(InputError, match="train --stop best"):
        figures.overfitting({}, "proxy")
