"""Adapters that leave out rows: what they train on, what is measured on them, and when they stop."""

import pytest
import torch
from safetensors.torch import load_file

from mini_symposium.data.dataset import load_examples
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import load_curves, risen_for_good
from mini_symposium.models.adapters import find_checkpoint
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, find
from mini_symposium.training import cross_validation, finetune
from mini_symposium.training.cross_validation import cross_validate, folds, stop_rule

RATE = 1e-3


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny", num_epochs=3)


@pytest.fixture(scope="module")
def examples():
    return load_examples(find("data/minisymposium.md"))[:6]


@pytest.fixture(scope="module")
def crossed(recipe, examples, tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("crossed"))
    return run, cross_validate(recipe, examples, run, [RATE], 4)


def adapter(run, epoch, rate=RATE):
    return load_file(run.checkpoints(rate)[epoch] / "adapter_model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("rows", [4, 5, 13, 16])
def test_folds_leave_out_equally_many_and_every_row(rows):
    for count in range(2, rows + 1):
        some = folds(rows, count, 42)
        assert len({len(fold) for fold in some}) == 1 and 2 <= len(some) <= count
        assert set().union(*some) == set(range(rows)) and all(len(set(fold)) == len(fold) for fold in some)
    assert sorted(folds(rows, rows, 7)) == [(row,) for row in range(rows)]
    assert folds(rows, 4, 1) == folds(rows, 4, 1)
    assert rows == 4 or folds(rows, 4, 1) != folds(rows, 4, 2)


def test_a_fold_is_the_adapter_of_its_rows_alone_to_the_bit(recipe, examples, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = RunDirectory(tmp_path / "again")
        cross_validate(recipe, examples, again, [RATE], 4)
        for k, fold in list(enumerate(folds(6, 4, recipe.seed)))[:2]:
            alone = RunDirectory(tmp_path / f"alone-{k}")
            rest = [example for n, example in enumerate(examples) if n not in fold]
            finetune.train(recipe, rest, alone, [RATE])
            own = RunDirectory(again.path / "folds" / f"4-fold-{k + 1}")
            assert equal(adapter(own, 3), adapter(alone, 3))
            assert not equal(adapter(own, 3), adapter(own, 0))
    finally:
        torch.set_num_threads(threads)


def test_each_row_is_measured_by_the_adapters_that_never_saw_it(crossed, recipe):
    run, curves = crossed
    for k, fold in enumerate(folds(6, 4, recipe.seed)):
        own = RunDirectory(run.path / "folds" / f"4-fold-{k + 1}")
        assert {line["example"] for line in own.metrics(RATE)} == set(range(6)) - set(fold)
        measured = [(line["epoch"], line["example"]) for line in own.probes(RATE)]
        assert sorted(measured) == [(epoch, row) for epoch in range(4) for row in sorted(fold)]
    curve = curves[RATE]
    assert (len(curve.loss), len(curve.loss[0]), len(curve.trained_em), curve.steps) == (4, 6, 3, 4)
    # B is zero before the first step, so that all adapters measure what the base does.
    start = [
        line["loss"]
        for k in range(3)
        for line in RunDirectory(run.path / "folds" / f"4-fold-{k + 1}").probes(RATE)
        if line["epoch"] == 0
    ]
    assert sum(curve.loss[0]) == pytest.approx(sum(start), rel=1e-4)
    assert load_curves(run)[RATE] == curve


def test_it_stops_by_itself_and_a_second_call_trains_nothing(recipe, examples, tmp_path, monkeypatch):
    """At a rate of 1 the random model first learns how frequent each token is, and is then wrecked."""
    run = RunDirectory(tmp_path)
    longer = recipe.replace(num_epochs=14)
    curve = cross_validate(longer, examples, run, [1.0], 2)[1.0]
    assert risen_for_good(curve.loss) and len(curve.loss) < 15
    monkeypatch.setattr(finetune, "train_pass", lambda *_: pytest.fail("trained again"))
    assert cross_validate(longer, examples, run, [1.0], 2)[1.0] == curve
    monkeypatch.undo()
    with pytest.raises(InputError, match="another num_epochs"):
        cross_validate(recipe, examples, run, [1.0], 2)
    assert len(cross_validate(recipe, examples, run, [RATE], 2, overwrite=True)[RATE].loss) == 4
    assert set(load_curves(run)) == {RATE}


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(recipe, examples, tmp_path):
    whole, stopped = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "stopped")
    finetune.train(recipe, examples, whole, [RATE, 1e-4])
    for _ in range(2):  # the second call has nothing to do
        finetune.train(recipe, examples, stopped, [RATE, 1e-4], stop=stop_rule("2", 3))
        assert max(stopped.checkpoints(RATE)) == max(stopped.checkpoints(1e-4)) == 2
        assert len(stopped.metrics(RATE)) == 2 * len(examples)
    finetune.train(recipe, examples, stopped, [RATE, 1e-4])
    assert all(equal(adapter(whole, 3, rate), adapter(stopped, 3, rate)) for rate in (RATE, 1e-4))


def test_the_default_checkpoint_is_the_recommended_one(crossed, recipe, examples, tmp_path):
    run, curves = RunDirectory(tmp_path), crossed[1]
    finetune.train(recipe, examples, run, [RATE])
    assert find_checkpoint(run).name == "epoch-0003"
    loss = curves[RATE].loss
    turned = type(curves[RATE])(**{**vars(curves[RATE]), "loss": [loss[0], loss[1], loss[3], loss[2]]})
    assert turned.means.argmin() == 2
    cross_validation.save_curves(run, {RATE: turned})
    assert find_checkpoint(run).name == "epoch-0002" == run.offered_checkpoints()["1e-03"].name
    assert find_checkpoint(run, "epoch-3").name == "epoch-0003" == run.newest_checkpoints()["1e-03"].name


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        (slice(3), 2, "3 rows: leaving some out takes 4 or more"),
        (slice(6), 1, "takes a number from 2 to 6"),
        (slice(6), 7, "takes a number from 2 to 6"),
        ([0] * 5, 2, "all 5 rows are the same text"),
    ],
)
def test_what_cannot_be_left_out_is_refused(recipe, examples, tmp_path, rows, count, message):
    some = examples[rows] if isinstance(rows, slice) else [examples[row] for row in rows]
    with pytest.raises(InputError, match=message):
        cross_validate(recipe, some, RunDirectory(tmp_path / "run"), [RATE], count)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("soon", "is best, recite, or an epoch"), ("0", "from 1 to num_epochs = 30"), ("31", "from 1 to num_epochs = 30")],
)
def test_a_stop_that_is_none_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        stop_rule(text, 30)


def test_training_again_forgets_curves_of_other_rows_and_keeps_its_own(recipe, examples, tmp_path):
    run = RunDirectory(tmp_path)
    cross_validate(recipe, examples, run, [RATE], 2)
    finetune.train(recipe, examples, run, [RATE], overwrite=True)
    assert set(load_curves(run)) == {RATE} and run.folds.exists()
    finetune.train(recipe, examples[:3], run, [RATE], overwrite=True)
    assert load_curves(run) == {} and not run.folds.exists()


def test_a_damaged_recommendation_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    run.curve_file.write_text('{"recommended": 3}')
    with pytest.raises(InputError, match=r"curve\.json: not curves that this kit wrote"):
        run.recommended(RATE)
