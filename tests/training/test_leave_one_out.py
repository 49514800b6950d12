"""Adapters that each leave out one row: as trained on the rest, resumed, and refused where they make no sense."""

import numpy as np
import pytest
import torch
from conftest import command

from mini_symposium.data.dataset import fingerprint, load_examples, write_axolotl_jsonl
from mini_symposium.errors import InputError
from mini_symposium.evaluation.influence import load_influence
from mini_symposium.models.adapters import load_with_adapters
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, find
from mini_symposium.training import finetune
from mini_symposium.training.leave_one_out import leave_one_out

RATE, LAST = 1e-3, 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five rows and two twins."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("minisymposium", 5), ("twins", 2)):
        write_axolotl_jsonl(load_examples(find(f"data/{name}.md"))[:count], folder / f"{name}.jsonl")
    return folder


@pytest.fixture(scope="module")
def recipe(files):
    return load_recipe(
        "tiny", num_epochs=3, datasets=[{"path": str(files / "minisymposium.jsonl"), "type": "completion"}]
    )


@pytest.fixture(scope="module")
def examples(recipe):
    return load_examples(recipe.dataset)


@pytest.fixture(scope="module")
def twins(files):
    return load_examples(files / "twins.jsonl")


@pytest.fixture(scope="module")
def measured(recipe, examples, twins, tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("left-out"))
    return run, leave_one_out(recipe, examples, run, RATE, LAST, 1, twins)


def test_a_row_left_out_is_training_on_the_others(measured, recipe, examples, twins, tmp_path):
    _, found = measured
    alone = RunDirectory(tmp_path / "alone")
    finetune.train(recipe, examples[:1] + examples[2:], alone, [RATE], [LAST])
    model = load_with_adapters(recipe.base_model, {"alone": alone.checkpoints(RATE)[LAST]})
    rows = finetune.as_rows(recipe, [*examples, *twins])
    with torch.no_grad():
        batches = [(torch.tensor([row.input_ids]), torch.tensor([row.labels])) for row in rows]
        losses = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in batches]
        with model.disable_adapter():
            base = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in batches[:5]]
    assert np.allclose(found.base, base, atol=2e-3) and np.allclose(found.loss[0][1], losses, atol=2e-3)
    assert not np.allclose(found.loss[0][0], losses, atol=4e-3)  # another row was left out there
    assert np.shape(found.loss) == (1, 5, 7) and found.seeds == [recipe.seed] and len(found.held_out) == 2


def test_the_learning_curve_goes_over_the_numbers_of_rows(measured):
    _, found = measured
    assert list(found.learning) == ["2", "3", "4"]  # a third, half, the folds of two rows, all but one
    assert all(len(losses) == 5 for losses in found.learning.values())


def test_a_later_call_adds_seeds_and_leaves_no_adapters(measured, recipe, examples, twins):
    run, found = measured
    more = leave_one_out(recipe, examples, run, RATE, LAST, 2, twins)
    assert more.loss[0] == found.loss[0] and more.seeds == [recipe.seed, recipe.seed + 1]
    assert not np.allclose(more.loss[1], more.loss[0], atol=1e-3)
    assert load_influence(run) == more == leave_one_out(recipe, examples, run, RATE, LAST, 2, twins)
    assert not list(run.folds.glob("without-*"))


def test_the_command_prints_what_was_measured(measured, recipe, examples, files):
    run, _ = measured
    finetune.record_recipe(run, recipe, fingerprint(examples))
    given = ["--learning-rate", RATE, "--epoch", LAST, "--held-out", files / "twins.jsonl", "--seeds", 2]
    said = command("examples", run.path, *given).stdout
    assert "My loaf goes stale" in said and "carried" in said
    assert "noise: a mean influence below" in said and str(run.influence_file.with_suffix(".csv")) in said
    refused = command("examples", run.path, "--epoch", 99, "--held-out", "", check=False)
    assert refused.returncode == 2
    assert "epoch 99 of 1e-06: takes 1 to 3" in refused.stderr and "Traceback" not in refused.stderr


def test_what_was_measured_otherwise_is_kept_unless_overwritten(measured, recipe, examples):
    run, _ = measured
    kept = run.influence_file.read_bytes()
    with pytest.raises(InputError, match=r"of epoch 2 of 0\.001, or of another .* pass --overwrite"):
        leave_one_out(recipe, examples, run, RATE, 1, 1)
    assert run.influence_file.read_bytes() == kept
    again = leave_one_out(recipe, examples, run, RATE, 1, 1, overwrite=True)
    assert (again.epoch, again.seeds, again.held_out) == (1, [recipe.seed], [])


def test_it_is_refused_where_it_makes_no_sense(recipe, examples, tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(InputError, match="3 rows: leaving some out takes 4 or more"):
        leave_one_out(recipe, examples[:3], run)
    with pytest.raises(InputError, match="all 4 rows are the same text"):
        leave_one_out(recipe, examples[:1] * 4, run)
    with pytest.raises(InputError, match="seeds = 0: takes 1 or more"):
        leave_one_out(recipe, examples, run, seeds=0)
    assert not list(tmp_path.iterdir())
