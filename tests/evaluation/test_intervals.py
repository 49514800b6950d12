import numpy as np
import pytest
from scipy.special import betaincinv

from mini_symposium.errors import InputError
from mini_symposium.evaluation.intervals import difference, interval, needed, p_value, spread


def coverage(make, truth, **options):
    """How often, in 1000 samples, the interval holds the truth."""
    found = [interval(make(np.random.default_rng(k)), **options) for k in range(1000)]
    return sum(each.low <= truth <= each.high for each in found) / 1000


def crossed(prompts, seeds, of_prompts, of_seeds, noise):
    """Values with an effect of the prompt, one of the seed, and noise, of these standard deviations around 0."""

    def make(generator):
        sizes = ((of_prompts, (prompts, 1)), (of_seeds, (1, seeds)), (noise, (prompts, seeds)))
        return sum(generator.normal(0, scale, shape) for scale, shape in sizes)

    return make


def clopper_pearson(k, n):
    """The exact interval of a proportion (Clopper and Pearson 1934)."""
    return float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0, float(
        betaincinv(k + 1, n - k, 0.975)
    ) if k < n else 1.0


@pytest.mark.parametrize("n", [2, 6, 13, 60, 124])
def test_of_yes_and_no_the_interval_is_clopper_and_pearsons_at_every_count(n):
    for k in range(n + 1):
        found = interval([1] * k + [0] * (n - k))
        assert (found.low, found.high) == pytest.approx(clopper_pearson(k, n), abs=1e-6)
        assert interval(np.repeat([[1]] * k + [[0]] * (n - k), 3, 1)).low == pytest.approx(found.low)


def test_an_end_never_falls_where_a_prompt_does_better():
    """Also with several values, and whatever prompt it is."""
    generator = np.random.default_rng(0)
    for _ in range(60):
        values = generator.integers(0, 9, 12) / 8
        better = values.copy()
        better[generator.integers(12)] = 1.0
        worse, good = interval(values), interval(better)
        assert good.low >= worse.low - 1e-7 and good.high >= worse.high - 1e-7
        assert p_value(better, 0.0) <= p_value(values, 0.0) + 1e-7


def test_interval_and_p_value_cannot_disagree():
    for values, bounds in (([0.2, 0.4, 0.9, 1.0], (0, 1)), ([[3.0, 3.4], [3.1, 3.2], [2.9, 3.3]], None)):
        found = interval(values, bounds)
        for end in (found.low, found.high):
            assert p_value(values, end, bounds) == pytest.approx(0.05, abs=1e-4)


def test_what_is_needed_grows_as_the_effect_shrinks_and_none_is_enough_for_none():
    generator = np.random.default_rng(0)
    values = generator.normal(0.3, 0.2, (13, 3))
    sizes = [needed(values, values.mean() - gap, None, 0.05)[0] for gap in (0.3, 0.2, 0.1)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert needed(values, values.mean() - 1e-5, None, 0.05) is None
    assert needed([0] * 60, 0.05, (0, 1), 0.05)[0] == 72 and 0.95**72 < 0.025 < 0.95**71
    assert needed([1] * 60, 0.95, (0, 1), 0.05)[0] == 72
    one_seed_is_off = values + np.array([0, 0, 0.5])
    assert needed(one_seed_is_off, values.mean() - 0.2, None, 0.05)[1] > 3


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_a_pass_rate_over_60_prompts_is_covered_as_often_as_it_says(rate):
    assert 0.92 < coverage(lambda generator: generator.random(60) < rate, rate) < 0.98


@pytest.mark.parametrize("n", [6, 13, 60])
def test_shares_in_formats_and_rare_gains_are_covered_at_least_as_often_as_it_says(n):
    """Means of eight answers, and differences most of which are 0."""
    shares = coverage(lambda generator: generator.binomial(8, generator.beta(0.3, 0.7, n)) / 8, 0.3)
    gains = coverage(lambda generator: generator.choice([-1, 0, 1], n, p=[0.05, 0.8, 0.15]), 0.1, bounds=(-1, 1))
    assert min(shares, gains) > 0.94


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


def test_seeds_and_formats_that_agree_are_no_more_prompts():
    never, always = interval(np.zeros((60, 3, 8))), interval([True] * 13)
    assert (never.low, never.high) == pytest.approx((0, 0.0596), abs=1e-4)
    assert (always.low, always.high) == pytest.approx((clopper_pearson(13, 13)[0], 1))
    assert (never.n, never.seeds) == (60, 3)
    nowhere = difference([True] * 60, [True] * 60)
    assert (nowhere.low, nowhere.high) == pytest.approx((-0.0596, 0.0596), abs=1e-4)


def test_seeds_that_differ_widen_the_interval():
    prompts = (np.arange(40) < 20)[:, None]
    alike, apart = np.repeat(prompts, 3, 1), np.concatenate([prompts, prompts, np.arange(40)[:, None] < 34], 1)
    (low, high), (lower, higher) = ((x.low - x.value, x.high - x.value) for x in map(interval, (alike, apart)))
    assert lower < low - 0.1 and higher > high + 0.1


def test_formats_are_averaged_and_do_not_count_as_prompts():
    table = np.random.default_rng(0).random((20, 3, 8)) < 0.5
    assert interval(table) == interval(table.mean(2))
    assert interval(table).n == 20


def test_pairing_sees_what_the_prompts_hide():
    generator = np.random.default_rng(0)
    hard = generator.random(60)
    worse, better = hard * 0.8, hard * 0.8 + 0.05 + generator.normal(0, 0.01, 60)
    paired = difference(better, worse, None)
    assert 0.04 < paired.low < paired.value < paired.high < 0.06
    assert interval(better).low < interval(worse).high
    assert difference(worse, better, None).high == pytest.approx(-paired.low)
    shuffled = difference(generator.permutation(better), worse)
    assert shuffled.low < 0 < shuffled.high


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
