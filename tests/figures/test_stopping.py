import io

import numpy as np
import pytest
from PIL import Image

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
    legend = picture.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "LR 1e-4: best after epoch 6,\nrecites from epoch 12 on",
        "LR 1e-5: best after epoch 20",
    ]
    high, low = legend.get_lines()
    assert high.get_linestyle() != low.get_linestyle()  # to be told apart in grey
    assert picture.png() == figures.overfitting(curves, "proxy").png()


def test_without_a_curve_it_says_how_to_get_one():
    with pytest.raises(InputError, match="train --stop best"):
        figures.overfitting({}, "proxy")


NAMES = ("Qwen2.5-Coder-0.5B-Instruct", "proxy", "mine", "gemma-3-270m")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_model_has_a_panel_by_size_and_all_share_one_scale(count):
    models = {name: {1e-4: curve(1e-4, 6, 16), 1e-5: curve(1e-5, 20, 30)} for name in NAMES[:count]}
    models["proxy" if count > 1 else NAMES[0]].pop(1e-4)
    picture = figures.overfitting_of_models(models)
    titles = ["proxy: SmolLM2-135M", "base: Gemma-3-270M", "half: Qwen2.5-Coder-0.5B", "mine"]
    there = {"proxy": titles[0], "gemma-3-270m": titles[1], NAMES[0]: titles[2], "mine": "mine"}
    assert [axes.get_title("left") for axes in picture.axes] == [
        title for title in titles if title in {there[name] for name in models}
    ]
    assert len({axes.get_ylim() for axes in picture.axes}) == len({axes.get_xlim() for axes in picture.axes}) == 1
    starts = picture.drawn[picture.drawn["epoch"] == 0]
    assert (starts["change"] == 0).all() and len(starts) == 2 * count - 1
    looks = {
        handle.get_label()[:7]: (handle.get_color(), str(handle.get_linestyle()))
        for axes in picture.axes
        for handle in axes.get_legend().get_lines()
    }
    assert len(set(looks.values())) == len(looks) == min(count, 2)  # one rate looks the same in every panel
    png = picture.png()
    assert png == figures.overfitting_of_models(dict(reversed(models.items()))).png()
    image = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 255).all()  # no text is cut off


def test_a_loss_that_still_falls_is_said_to():
    falling = curve(1e-5, 20, 15)
    picture = figures.overfitting({1e-5: falling}, "proxy")
    assert [text.get_text() for text in picture.axes[0].get_legend().get_texts()] == [
        "LR 1e-5: still falling at epoch 15"
    ]
    [dot] = [line for line in picture.axes[1].lines if line.get_marker() == "o"]
    assert dot.get_color() == "white" and len(dot.get_xdata()) == 1


@pytest.mark.parametrize("models", [{}, {"proxy": {}}])
def test_models_without_a_curve_are_refused(models):
    with pytest.raises(InputError, match="train --stop best"):
        figures.overfitting_of_models(models)
