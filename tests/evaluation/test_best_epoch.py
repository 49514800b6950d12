"""Curves whose best epoch is known, and what is said of them."""

import json

import numpy as np
import pytest

from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import (
    Curve,
    better_at_best,
    in_words,
    load_curves,
    recommend,
    rise,
    risen_for_good,
    save_curves,
)
from mini_symposium.run import RunDirectory

ROWS = 13


def curve(best=6, epochs=20, depth=0.8, noise=0.02, rate=1e-4, lift=0.0, seed=0):
    """A curve that falls to its best epoch and rises after it, with rows far apart and a little noise."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(0, 0.6, ROWS)
    epoch = np.arange(epochs + 1)
    mean = 4 + lift - depth * (1 - ((epoch - best) / best) ** 2).clip(-3, 1)
    loss = mean[:, None] + rows + generator.normal(0, noise, (epochs + 1, ROWS))
    em = np.minimum(0.075 * epoch[:-1], 1)
    return Curve(rate, 4, 9, loss.tolist(), (loss * 0).tolist(), (5 - em).tolist(), em.tolist())


@pytest.mark.parametrize("best", [2, 6, 11])
def test_the_best_epoch_of_a_known_curve_is_found(best):
    found = [recommend(curve(best=best, seed=seed)) for seed in range(20)]
    assert {each.epoch for each in found} <= {best - 1, best, best + 1}
    assert all(each.first <= each.epoch <= each.last and each.turned for each in found)
    assert {each.recites_from for each in found} == {13}


def test_rows_differ_more_than_epochs_and_do_not_widen_the_window():
    """The standard error is that of differences within rows: rows that lie far apart change nothing."""
    near = curve()
    far = Curve(**{**vars(near), "loss": (np.array(near.loss) + 50 * np.arange(ROWS)).tolist()})
    assert recommend(far).first == recommend(near).first and recommend(far).last == recommend(near).last
    assert np.allclose(rise(far.loss)[2], rise(near.loss)[2])


def test_a_curve_that_still_falls_has_no_best_and_says_so():
    falling = curve(best=40)
    found = recommend(falling)
    assert not found.turned and found.epoch == 20 and "train longer" in str(found)
    assert not any(risen_for_good(falling.loss[:epoch]) for epoch in range(1, 22))


def test_a_curve_that_only_rises_says_that_nothing_carries_over():
    rising = Curve(
        1e-4, 4, 9, [[4 + 0.2 * epoch + row for row in range(ROWS)] for epoch in range(8)], [], [1] * 7, [0] * 7
    )
    assert recommend(rising).epoch == 0 and "does not carry over" in str(recommend(rising))


@pytest.mark.parametrize("best", [1, 4, 9])
def test_it_stops_after_the_best_and_not_before(best):
    for seed in range(10):
        losses = curve(best=best, epochs=30, seed=seed).loss
        stops = next(epoch for epoch in range(31) if risen_for_good(losses[: epoch + 1]))
        assert best + 2 <= stops <= max(2 * best, best + 5)


def test_equal_rates_cannot_be_told_apart_and_different_ones_can():
    equal = [better_at_best(curve(rate=1e-5, seed=seed), curve(seed=seed)) for seed in range(3)]
    assert all(low <= value <= high and low <= 0 <= high for value, low, high in equal)
    value, low, high = better_at_best(curve(lift=-0.3, rate=1e-5), curve())
    assert low < value < high < 0
    told = in_words({1e-4: curve(), 1e-5: curve(lift=-0.3, rate=1e-5)})
    assert "the best of 1e-05 is better than that of 0.0001" in told
    told = in_words({1e-4: curve(), 1e-5: curve(rate=1e-5, noise=0.03, seed=0)})
    assert "cannot be told apart" in told and "epochs wide at 1e-05" in told


def test_the_interval_holds_the_true_difference():
    """Rows drawn anew 200 times; the true difference of the bests is 0.1."""
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        high, low = curve(seed=seed), curve(rate=1e-5, seed=seed)
        shifted = np.array(low.loss) - 0.1 + generator.normal(0, 0.15, ROWS)
        _, least, most = better_at_best(Curve(**{**vars(low), "loss": shifted.tolist()}), high)
        inside += least <= -0.1 <= most
    assert inside >= 180


def test_curves_are_read_back_and_a_run_knows_what_to_take(tmp_path):
    run = RunDirectory(tmp_path)
    assert load_curves(run) == {} and run.recommended(1e-4) is None
    kept = {1e-4: curve(), 1e-5: curve(rate=1e-5, best=40)}
    save_curves(run, kept)
    assert load_curves(run) == kept
    assert run.recommended(1e-4) is None  # no checkpoint of it was kept
    best = recommend(kept[1e-4]).epoch
    for epoch in (best, 20):
        (tmp_path / "lr-1e-04" / "checkpoints" / f"epoch-{epoch:04d}").mkdir(parents=True)
        (tmp_path / "lr-1e-05" / "checkpoints" / f"epoch-{epoch:04d}").mkdir(parents=True)
    assert run.recommended(1e-4) == best and run.recommended(1e-5) is None  # 1e-5 still falls


@pytest.mark.parametrize("change", [{"curves": 3}, {"curves": [{"learning_rate": 1}]}, {"curves": [{"loss": []}]}])
def test_a_damaged_file_is_refused_by_name(tmp_path, change):
    run = RunDirectory(tmp_path)
    save_curves(run, {1e-4: curve()})
    run.curve_file.write_text(json.dumps(json.loads(run.curve_file.read_text()) | change))
    with pytest.raises(InputError, match=r"curve\.json: not curves that this kit wrote"):
        load_curves(run)


def test_curves_of_other_rows_are_not_compared():
    fewer = curve()
    fewer = Curve(**{**vars(fewer), "loss": [row[:5] for row in fewer.loss]})
    with pytest.raises(InputError, match="5 and 13 rows"):
        better_at_best(fewer, curve())
