import numpy as np
import pytest

from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import clopper_pearson, difference, interval, spread


def coverage(make, truth, **options):
    """How often, in 1000 samples, the interval holds the truth."""
    found = [interval(make(np.random.default_rng(k)), seed=k, draws=600, **options) for k in range(1000)]
    return sum(each.low <= truth <= each.high for each in found) / 1000


def crossed(prompts, seeds, of_prompts, of_seeds, noise):
    """Values with an effect of the prompt, one of the seed, and noise, of these standard deviations around 0."""

    def make(generator):
        sizes = ((of_prompts, (prompts, 1)), (of_seeds, (1, seeds)), (noise, (prompts, seeds)))
        return sum(generator.normal(0, scale, shape) for scale, shape in sizes)

    return make


def test_clopper_pearson_is_the_textbook_interval():
    assert clopper_pearson(0, 60).high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert clopper_pearson(60, 60).low == pytest.approx(0.025 ** (1 / 60))
    found = clopper_pearson(4, 20)  # Clopper and Pearson's own kind of table: 0.0573 to 0.4366
    assert (found.low, found.high) == pytest.approx((0.0573, 0.4366), abs=1e-4)
    with pytest.raises(InputError, match="0 of 0: not a proportion"):
        clopper_pearson(0, 0)


def test_exact_intervals_never_cover_less_than_they_say():
    for rate in (0.02, 0.1, 0.5):
        held = [
            (found := clopper_pearson(int(k), 60)).low <= rate <= found.high
            for k in np.random.default_rng(0).binomial(60, rate, 1000)
        ]
        assert sum(held) / 1000 > 0.94


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_a_pass_rate_over_60_prompts_is_covered_as_often_as_it_says(rate):
    assert 0.92 < coverage(lambda generator: generator.random(60) < rate, rate) < 0.98


@pytest.mark.parametrize(
    "effects",
    [(13, 1, 1, 0, 0.3), (13, 3, 1, 0.1, 0.3), (13, 3, 0.3, 1, 0.3), (60, 5, 0.5, 0.1, 0.3)],
    ids=["one seed", "rows differ", "three seeds differ", "60 prompts"],
)
def test_a_dozen_rows_and_three_seeds_are_covered_as_often_as_it_says(effects):
    assert 0.92 < coverage(crossed(*effects), 0, bounds=None) < 0.98


def test_resampling_answers_as_if_they_were_prompts_would_be_far_too_sure():
    """The control: the same values, their prompts forgotten."""
    make = crossed(13, 5, 1, 0, 0.1)
    assert coverage(lambda generator: make(generator).ravel(), 0, bounds=None) < 0.75


def test_at_0_and_1_the_interval_is_clopper_and_pearsons_over_prompts():
    never, always = interval(np.zeros((60, 3, 8))), interval([True] * 13)
    assert (never.low, never.high) == pytest.approx((0, 0.0596), abs=1e-4)
    assert (always.low, always.high) == pytest.approx((clopper_pearson(13, 13).low, 1))
    assert (never.method, never.n, never.seeds) == ("Clopper-Pearson", 60, 3)
    nowhere = difference([True] * 60, [True] * 60)
    assert (nowhere.low, nowhere.high) == pytest.approx((-0.0596, 0.0596), abs=1e-4)


def test_formats_are_averaged_and_do_not_count_as_prompts():
    table = np.random.default_rng(0).random((20, 3, 8)) < 0.5
    assert interval(table) == interval(table.mean(2))
    assert interval(table).n == 20


def test_pairing_sees_what_the_prompts_hide():
    generator = np.random.default_rng(0)
    hard = generator.random(60)
    worse, better = hard * 0.8, hard * 0.8 + 0.05 + generator.normal(0, 0.01, 60)
    paired = difference(better, worse)
    assert 0.04 < paired.low < paired.value < paired.high < 0.06
    assert interval(better).low < interval(worse).high
    assert difference(worse, better).high == pytest.approx(-paired.low, abs=1e-3)
    shuffled = difference(generator.permutation(better), worse)
    assert shuffled.low < 0 < shuffled.high


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(0).random(30)
    assert interval(values) == interval(values) != interval(values, seed=1)


def test_eight_equal_formats_show_the_known_spread():
    tables = [np.random.default_rng(k).random((60, 8)) < 0.5 for k in range(1000)]
    shown = [np.ptp(table.mean(0)) for table in tables]
    assert np.mean(shown) == pytest.approx(0.185, abs=0.01)
    assert np.quantile(shown, 0.95) == pytest.approx(0.28, abs=0.02)
    found = [spread(table, draws=300) for table in tables[:200]]
    assert np.mean([each.null_mean for each in found]) == pytest.approx(0.185, abs=0.01)
    assert np.mean([each.null_95 for each in found]) == pytest.approx(0.28, abs=0.02)
    assert np.mean([each.p < 0.05 for each in found]) < 0.08


def test_a_format_that_fails_is_beyond_the_null_and_hard_prompts_are_not():
    generator = np.random.default_rng(0)
    equal = generator.random((60, 8)) < 0.5
    broken = equal.copy()
    broken[:, 3] &= generator.random(60) < 0.4
    assert spread(broken).p < 0.01 < spread(equal).p
    assert spread(broken).value > spread(broken).null_95
    hard = np.repeat(np.arange(60) < 30, 8).reshape(60, 8)  # half the prompts fail everywhere: formats are equal
    assert (spread(hard).value, spread(hard).null_95, spread(hard).p) == (0, 0, 1)


@pytest.mark.parametrize(
    ("values", "bounds", "message"),
    [
        ([], (0, 1), "nothing was measured"),
        ([[0.5, 0.5], [0.5, float("nan")]], (0, 1), r"no value at \[1, 1\] \(prompt, seed\)"),
        ([0.5, 3.2], (0, 1), r"values from 0\.5 to 3\.2, beyond \(0, 1\)"),
        ([3.2, 3.2], None, "all 2 values are 3.2"),
    ],
)
def test_what_cannot_be_averaged_says_why(values, bounds, message):
    with pytest.raises(InputError, match=message):
        interval(values, bounds)


def test_unpaired_values_and_a_single_format_are_refused():
    with pytest.raises(InputError, match="needs the same prompts and seeds"):
        difference([1, 0, 1], [1, 0])
    with pytest.raises(InputError, match="two formats or more"):
        spread([[True], [False]])
