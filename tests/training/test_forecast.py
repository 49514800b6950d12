"""The slopes are those of the loss itself, and the law forecasts what it was not fitted to."""

import json
import math
from dataclasses import astuple

import numpy as np
import pandas as pd
import pytest
import torch

from mini_symposium.claims.evidence import load_evidence
from mini_symposium.data.dataset import load_examples
from mini_symposium.errors import InputError
from mini_symposium.recipe import load_recipe
from mini_symposium.run import ROOT, RunDirectory, Training, find
from mini_symposium.training import forecast as module
from mini_symposium.training.finetune import as_rows, build_trainer, train
from mini_symposium.training.forecast import (
    MOMENTS,
    Slopes,
    append_to_log,
    check,
    doses,
    epochs_of,
    fit,
    forecast,
    foresee,
    reached,
    read_log,
    slopes,
    trainings,
)
from mini_symposium.training.memory_plan import Acceleration


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny")


@pytest.fixture(scope="module")
def rows(recipe):
    return as_rows(recipe, load_examples(find("data/minisymposium.md"))[:4])


@pytest.fixture(scope="module")
def found(recipe, rows):
    return slopes(recipe, rows)


def test_the_slopes_are_the_falls_of_the_loss(recipe, rows, found, tmp_path):
    """Move B against its gradient's sign by t, then A against its own: the loss falls by S t, and by Q t^2 more."""
    trainer = build_trainer([Training.of(recipe, tmp_path)], rows, tmp_path / "scratch")
    parts = {part: [p for n, p in trainer.model.named_parameters() if part in n] for part in ("lora_A", "lora_B")}

    def loss(backward=False):
        trainer.model.zero_grad()
        total = 0.0
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            own = trainer.model(input_ids=ids, labels=labels).loss / len(rows)
            total += own.item()
            if backward:
                own.backward()
        return total

    step = 2e-3
    start = loss(backward=True)
    assert found.loss == pytest.approx(start, rel=1e-4)
    with torch.no_grad():
        for p in parts["lora_B"]:
            p.sub_(step * p.grad.sign())
    assert start - loss() == pytest.approx(found.first * step, rel=0.1)
    moved = loss(backward=True)
    with torch.no_grad():
        for p in parts["lora_A"]:
            p.sub_(step * p.grad.sign())
    assert moved - loss() == pytest.approx(found.second * step**2, rel=0.2)


def test_through_pefts_own_layers_the_slopes_are_the_same(recipe, rows, found, monkeypatch):
    monkeypatch.setattr(module, "choose", lambda *_: Acceleration.off("asked for"))
    assert slopes(recipe, rows) == Slopes(*(pytest.approx(each, rel=0.01) for each in astuple(found)))


def test_both_slopes_grow_with_alpha_and_not_with_the_rank(recipe, rows, found):
    twice = slopes(recipe.replace(lora_alpha=2 * recipe.lora_alpha), rows)
    assert twice.first == pytest.approx(2 * found.first, rel=1e-3)
    assert twice.second == pytest.approx(2 * found.second, rel=0.05)
    wider = slopes(recipe.replace(lora_r=4 * recipe.lora_r), rows)
    assert wider.first == pytest.approx(found.first, rel=0.3)  # and not four times it
    assert wider.second == pytest.approx(found.second, rel=0.3)


def world(spread=0.0, models=4, seed=0):
    """Trainings of models that obey the law, each with a G of its own."""
    generator, lines = np.random.default_rng(seed), []
    for model in range(models):
        own = Slopes(*generator.uniform((100, 3e4), (2000, 9e5)), 4.0)
        shift = math.exp(generator.normal(0, spread))
        for rate in (1e-4, 1e-5):
            line = {"model": f"m{model}", "dataset": "rows", "learning_rate": rate, "steps": 13, "loss": own.loss}
            line |= {"first": own.first, "second": own.second}
            epochs = [1 + own.dose(own.loss * gain * shift) / (rate * 13) for gain in (1.5, 5.0)]
            lines.append(line | dict(zip(MOMENTS, epochs, strict=True)))
    return pd.DataFrame(lines)


def test_a_model_that_was_left_out_is_forecast():
    whole = world(spread=0.0)
    left = whole[whole["model"] == "m0"].iloc[0]
    own, recipe = Slopes(left["first"], left["second"], 4.0), load_recipe("proxy", learning_rate=1e-4)
    line = forecast(recipe, 13, doses(own, 13, whole[whole["model"] != "m0"]))
    for moment in MOMENTS:
        assert line[moment] == pytest.approx(left[moment])
        assert line[f"{moment}_low"] == pytest.approx(line[f"{moment}_high"])


def test_intervals_hold_as_often_as_they_say():
    inside = []
    for seed in range(200):
        whole = world(spread=0.3, models=5, seed=seed)
        left = whole[whole["model"] == "m0"].iloc[0]
        own, recipe = Slopes(left["first"], left["second"], 4.0), load_recipe("proxy", learning_rate=1e-4)
        line = forecast(recipe, 13, doses(own, 13, whole[whole["model"] != "m0"]))
        inside += [line[f"{moment}_low"] <= left[moment] <= line[f"{moment}_high"] for moment in MOMENTS]
    assert 0.85 <= np.mean(inside) <= 0.95


def test_a_decaying_rate_comes_later_or_never():
    constant = load_recipe("proxy", learning_rate=1e-4)
    dose = 1e-4 * 13 * 10
    decaying = [epochs_of(dose, constant.replace(lr_scheduler=rule), 13) for rule in ("linear", "cosine")]
    assert epochs_of(dose, constant, 13) == pytest.approx(10)
    assert all(10 < epoch < 20 for epoch in decaying)
    assert epochs_of(1e-4 * 13 * 16, constant.replace(lr_scheduler="linear"), 13) == math.inf  # half the constant's 30
    assert epochs_of(1e-4 * 13 * 40, constant, 13) == pytest.approx(40)


def test_of_four_times_as_many_rows_each_is_known_after_twice_the_dose():
    found, recipe = Slopes(400.0, 9e4, 4.0), load_recipe("proxy", learning_rate=1e-4)
    few, many = (forecast(recipe, steps, doses(found, steps, world()))["known"] - 1 for steps in (5, 20))
    assert 20 * many == pytest.approx(2 * 5 * few)


def test_more_to_learn_takes_longer():
    recipe = load_recipe("proxy")
    little, much = (forecast(recipe, 13, doses(Slopes(400.0, 9e4, loss), 13, world()))["known"] for loss in (2.0, 4.0))
    assert little < much < 2 * little


def test_the_rate_that_is_asked_for_reaches_its_moment_then():
    found, recipe = doses(Slopes(400.0, 9e4, 4.0), 13), load_recipe("proxy")
    rate = forecast(recipe, 13, found)["rate_for_100"]
    assert forecast(recipe.replace(learning_rate=rate), 13, found)["known"] == pytest.approx(100)


def test_one_model_is_no_law():
    with pytest.raises(InputError, match="1 models and datasets"):
        fit(world(models=1), "recited")


def test_the_committed_trainings_are_ones_that_the_law_can_take():
    table = trainings()
    assert table["model"].nunique() >= 3 and (table[["first", "second", "learning_rate", "steps"]] > 0).all().all()
    assert (table["known"] < table["recited"].fillna(np.inf)).all()


def test_a_table_of_rates_and_ranks_measures_each_rank_once(recipe, monkeypatch):
    examples = load_examples(find("data/minisymposium.md"))[:4]
    asked = []
    monkeypatch.setattr(module, "slopes", lambda each, rows: asked.append(each.lora_alpha) or slopes(each, rows))
    some = [recipe.replace(learning_rate=rate, lora_alpha=alpha) for alpha in (8, 16) for rate in (1e-3, 1e-4)]
    table = foresee(some, examples)
    assert asked == [8, 16] and table["learning_rate"].tolist() == [1e-3, 1e-4] * 2
    for moment in MOMENTS:
        assert (table[f"{moment}_low"] < table[moment]).all() and (table[moment] < table[f"{moment}_high"]).all()
        assert table[moment][1] - 1 == pytest.approx(10 * (table[moment][0] - 1))
        assert table[moment][2] < table[moment][0]


@pytest.mark.parametrize("left_out", ["model", "dataset"])
def test_what_is_left_out_of_the_committed_trainings_is_forecast_as_the_docstring_says(left_out):
    table, found = trainings(), []
    for row in table.itertuples():
        own, recipe = Slopes(row.first, row.second, row.loss), load_recipe("proxy", learning_rate=row.learning_rate)
        there = table[table[left_out] != getattr(row, left_out)]
        line = forecast(recipe, row.steps, doses(own, row.steps, there))
        for moment in MOMENTS:
            if not math.isnan(true := getattr(row, moment)):
                inside = line[f"{moment}_low"] <= true <= line[f"{moment}_high"]
                found.append((moment, abs(line[moment] / true - 1), inside))
    found = pd.DataFrame(found, columns=["moment", "error", "inside"])
    errors, inside = found.groupby("moment")["error"].median(), found["inside"].mean()
    said = f"one {left_out} at a time, the median error is {errors['known']:.0%} and {errors['recited']:.0%}"
    assert f"{said}, and {inside:.0%} of the intervals hold" in " ".join(module.__doc__.split())


@pytest.fixture(scope="module")
def examples():
    return load_examples(find("data/minisymposium.md"))[:4]


def foreseen(recipe, examples, known=(1.0, 0.5, 2.0), recited=(2.0, 1.0, 3.0)):
    """What `foresee` returns, with these epochs."""
    line = {key: getattr(recipe, key) for key in ("learning_rate", "lora_r", "lora_alpha", "lr_scheduler")}
    for moment, epochs in (("known", known), ("recited", recited)):
        line |= dict(zip((moment, f"{moment}_low", f"{moment}_high"), epochs, strict=True))
    return pd.DataFrame([line])


def test_a_log_is_only_appended_to(tmp_path, recipe, examples):
    log = tmp_path / "log.jsonl"
    for epoch in (1.0, 2.0, 3.0):
        append_to_log(log, recipe, examples, foreseen(recipe, examples, (epoch, 0.5, 4.0)))
    lines = log.read_text().splitlines(keepends=True)
    assert [line["known"][0] for line in read_log(log)] == [1.0, 2.0, 3.0]
    for number, edited in {
        2: [lines[0], lines[1].replace("2.0", "2.5"), lines[2]],
        3: [*lines[:2], lines[2].replace("4.0", "9.0")],
        1: lines[1:],
    }.items():
        log.write_text("".join(edited))
        with pytest.raises(InputError, match=rf"log\.jsonl:{number}: this line, or one before it, is not as it was"):
            read_log(log)
        with pytest.raises(InputError, match="is not as it was"):
            append_to_log(log, recipe, examples, foreseen(recipe, examples))


def test_forecasts_are_scored_by_what_was_trained_after_them(tmp_path, recipe, examples):
    """A random model never knows half of its rows; the metrics are rewritten to say so."""
    log, high = tmp_path / "log.jsonl", recipe.replace(learning_rate=1e-3, num_epochs=3)
    append_to_log(log, high, examples, foreseen(high, examples))
    run = RunDirectory(tmp_path / "run")
    train(high, examples, run, [1e-3])
    assert check(log, [run])["measured"].isna().all() and check(log, [run])["inside"].isna().all()
    lines = run.metrics(1e-3)
    run.learning_rate_dir(1e-3).joinpath("metrics.jsonl").write_text(
        "".join(json.dumps({**line, "em": [0.2, 0.6, 0.95][line["epoch"]]}) + "\n" for line in lines)
    )
    known, recited = check(log, [run]).to_dict("records")
    assert known["measured"] == pytest.approx(0.75) and known["inside"] and known["error"] == pytest.approx(1 / 3)
    assert recited["measured"] == pytest.approx(1 + 0.3 / 0.35) and recited["inside"]
    first = run.learning_rate_dir(1e-3) / "metrics.jsonl"
    kept = first.read_text()
    first.write_text("".join(json.dumps({**line, "em": 0.99}) + "\n" for line in lines))
    assert list(check(log, [run])["error"]) == [math.inf] * 2  # and no division by zero
    first.write_text(kept)
    append_to_log(log, high, examples, foreseen(high, examples, (0.75, 0.7, 0.8)))
    assert check(log, [run])["forecast"][0] == 1.0  # not the one that was made afterwards


def test_a_training_without_an_older_forecast_is_refused(tmp_path, recipe, examples):
    log, high = tmp_path / "log.jsonl", recipe.replace(learning_rate=1e-3, num_epochs=1)
    append_to_log(log, high, examples[:3], foreseen(high, examples))
    run = RunDirectory(tmp_path / "run")
    train(high, examples, run, [1e-3])
    with pytest.raises(InputError, match=r"lr-1e-03: cannot be checked by .*: the forecast is of another dataset"):
        check(log, [run])
    append_to_log(log, high, examples, foreseen(high, examples))
    environment = {**run.environment(), "recorded": "2020-01-01T00:00:00+00:00"}
    run.environment_file.write_text(json.dumps(environment))
    with pytest.raises(InputError, match="is younger than the training"):
        check(log, [run])


def test_a_model_without_weights_is_foreseen_from_the_sizes_of_others(tmp_path, monkeypatch):
    recipe, file = load_recipe("paper"), tmp_path / "sizes.csv"
    monkeypatch.setattr(module, "SIZES", file)

    def foreseen(loss):
        """Of four models whose dose falls as the root of their size, but for the factors in `loss`."""
        lines = [
            (10**k, 100 * 10 ** (k / 2), 1e4 * 10**k, 4.0 * each)
            for k, each in zip((8, 8.5, 9, 9.5), loss, strict=True)
        ]
        pd.DataFrame(lines, columns=["parameters", "first", "second", "loss"]).to_csv(file, index=False)
        return module.foresee_by_size([recipe.replace(learning_rate=rate) for rate in (1e-6, 1e-7)], 10**10, 13)

    exact = foreseen([1.0] * 4)
    slopes_there = module.Slopes(100 * 1e5, 1e4 * 1e10, 4.0)
    for moment in module.MOMENTS:
        mean, _, _ = fit(trainings(), moment)
        dose = slopes_there.dose(4.0 * math.exp(mean))
        assert exact[moment].tolist() == pytest.approx([1 + dose / 1.3e-5, 1 + dose / 1.3e-6], rel=1e-6)
    rough = foreseen([1.0, 1.5, 0.7, 1.0])
    wide = [(found["known_high"] / found["known_low"])[0] for found in (exact, rough)]
    assert 1 < wide[0] < wide[1]
    with pytest.raises(InputError, match="r 8, alpha 16: a forecast by size is for r 16 and alpha 32"):
        module.foresee_by_size([recipe.replace(lora_r=8, lora_alpha=16)], 10**10, 13)


def test_the_sizes_are_those_of_the_measured_trainings():
    sizes = pd.read_csv(find(module.SIZES)).set_index("model")
    for row in trainings().query("dataset == 'thirteen' and r == 16").itertuples():
        of_size = sizes.loc[row.model]
        assert [of_size[key] for key in ("first", "second", "loss")] == [row.first, row.second, row.loss]


def test_the_measured_epochs_are_those_of_the_metrics():
    evidence = load_evidence("figures/claims/exploratory").trained
    high = {t.seed: t for t in evidence if t.name == "high"}
    of_the_proxy = "dataset == 'thirteen' and alpha == 32 and learning_rate == 1e-4 and model.str.startswith('Smol')"
    for row in trainings().query(of_the_proxy).itertuples():
        em = high[row.seed].em
        lines = [{"epoch": epoch, "em": value} for epoch, values in enumerate(em) for value in values]
        assert reached(lines, 0.5) == pytest.approx(row.known, abs=0.01)
        assert reached(lines, 0.9) == pytest.approx(row.recited, abs=0.01)
    assert math.isnan(reached(lines, 1.01)) and reached(lines, 0.0) == 0


def test_what_the_docstring_says_of_forecasts_made_beforehand():
    scored, log = pd.read_csv(find("figures/forecasts/checked.csv")), read_log(find(module.LOG))
    for row in scored.itertuples():
        lines = [line for line in log if line["learning_rate"] == row.learning_rate]
        [line] = [line for line in lines if line[row.moment][0] == pytest.approx(row.forecast, rel=1e-3)]
        assert line["recorded"] < row.recorded
        assert row.error == pytest.approx(abs(row.forecast - row.measured) / row.measured, rel=3e-3, abs=1e-3)
        assert row.inside == (row.low <= row.measured <= row.high)
    said = " ".join(module.__doc__.split())

    def told(some: pd.DataFrame, words: str) -> str:
        return words.format(f"{some['error'].median():.0%}", some["inside"].sum(), len(some))

    assert told(scored.query("law == 1"), "the median error was {}, and {} of {} epochs lay within") in said
    known, recited = (scored.query(f"law == 2 and moment == '{moment}'") for moment in MOMENTS)
    assert (
        told(scored.query("law == 3"), "from three seeds the median error was {}, and {} of {} epochs lay within")
        in said
    )
    help_page = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    assert f"{scored['inside'].sum()} of {len(scored)} lay within their intervals" in help_page
    assert told(known, "half known the median error was {}, and {} of {} epochs lay within") in said
    assert told(recited, "recited {}, and {} of {}.") in said
