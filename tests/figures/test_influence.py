import numpy as np
import pytest

from mini_symposium import figures
from mini_symposium.errors import InputError
from mini_symposium.evaluation.influence import Influence


def test_the_cells_are_the_influences_and_a_sign_is_beyond_the_noise():
    loss = 3 + np.random.default_rng(3).normal(0, 0.01, (2, 5, 7))
    loss[:, 1, [0, 6]] += 0.5
    loss[:, range(5), range(5)] += 0.4
    rows, held_out = [f"query {i}" for i in range(5)], ["twins.md:1", "twins.md:9"]
    found = Influence("proxy", 1e-4, 8, {}, rows, held_out, [4.0] * 5, [42, 43], loss.tolist())
    picture = figures.influence_map(found)
    heat = picture.axes[0]
    cells = np.ma.filled(heat.collections[0].get_array(), np.nan)
    assert np.allclose(cells, found.by_seed.mean(0), equal_nan=True) and cells[1, 0] == pytest.approx(0.5, abs=0.05)
    signs = {text.get_position(): text.get_text() for text in heat.texts if text.get_text() in "+−"}
    assert signs[0.5, 1.5] == signs[6.5, 1.5] == "+" and len(signs) < 6
    assert all((cells[int(y), int(x)] > 0) == (sign == "+") for (x, y), sign in signs.items())
    widths = [bar.get_width() for bar in picture.axes[1].patches]
    assert widths == pytest.approx([100 * share for share in found.carried]) and widths[0] == pytest.approx(60, abs=3)
    assert len(picture.drawn) == 2 * 5 * 7
    assert picture.png() == figures.influence_map(found).png()


def test_without_a_measurement_it_says_how_to_get_one():
    with pytest.raises(InputError, match="mini-symposium examples RUN"):
        figures.influence_map(None)
