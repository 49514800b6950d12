"""Which checkpoints a training resumes from, decided from their files alone."""

import shutil

import pytest

from mini_symposium.recipe import load_recipe
from mini_symposium.run import Training
from mini_symposium.training import checkpoints
from mini_symposium.training.checkpoints import ADAPTER_FILES, RESUME_FILES

EPOCHS = 4


def written(training: Training, *epochs: int, companions=()) -> Training:
    """A training whose checkpoints hold files as a trainer leaves them, in names; two lines of log for each epoch."""
    for epoch in epochs:
        folder = training.checkpoint(epoch)
        folder.mkdir(parents=True)
        for name in (ADAPTER_FILES | RESUME_FILES) - {"checksums.json"}:
            (folder / name).write_text(f"{name} of {epoch}")
        names = [f"{each.folder.name}" for each in companions or [training]]
        checkpoints.seal(folder, 2 * epoch, names, compiled=epoch > 2)
    log = "".join(f'{{"step": {step}}}\n' for step in range(1, 2 * max(epochs) + 1))
    training.metrics_file.write_text(log)
    return training


@pytest.fixture
def both(tmp_path):
    recipe = load_recipe("tiny", num_epochs=EPOCHS)
    pair = [Training.of(recipe.replace(learning_rate=rate), tmp_path / "run") for rate in (1e-4, 1e-7)]
    for training in pair:
        written(training, 3, EPOCHS, companions=pair)
    return pair


def test_what_was_sealed_can_be_resumed_and_says_how_it_was_trained(both):
    for training in both:
        assert checkpoints.resumable(training) == ({3, EPOCHS}, {})
        assert checkpoints.finished(training)
        assert checkpoints.companions(training, EPOCHS) == {each.folder for each in both}
        assert [checkpoints.compiled(training, epoch) for epoch in (3, EPOCHS, 9)] == [True, True, None]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder, log: (folder / "optimizer.pt").write_text("other"), "optimizer.pt is not what was written"),
        (lambda folder, log: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder, log: (folder / "checksums.json").unlink(), "checksums.json"),
        (lambda folder, log: (folder / "checksums.json").write_text("[]"), "not an object"),
        (lambda folder, log: (folder / "checksums.json").write_text("{}"), "files"),
        (lambda folder, log: log.write_text('{"step": 1}\n{"step": 2'), "metrics.jsonl has 1 whole lines of 8"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_its_reason(both, spoil, reason, capsys):
    training = both[0]
    spoil(training.checkpoint(EPOCHS), training.metrics_file)
    whole, damaged = checkpoints.resumable(training)
    assert EPOCHS not in whole and reason in damaged[training.checkpoint(EPOCHS)]
    assert not checkpoints.finished(training)
    checkpoints.plan_passes([training], 1)
    assert "damaged" in capsys.readouterr().out


def test_older_checkpoints_keep_their_adapters_alone(tmp_path):
    training = written(Training.of(load_recipe("tiny", num_epochs=EPOCHS), tmp_path), 0, 1, 2, 3, EPOCHS)
    checkpoints.strip_older(training, EPOCHS)
    left = {epoch: {path.name for path in folder.iterdir()} for epoch, folder in training.checkpoints().items()}
    assert left == {
        **dict.fromkeys((0, 1, 2), ADAPTER_FILES),
        **dict.fromkeys((3, EPOCHS), ADAPTER_FILES | RESUME_FILES),
    }


def test_a_pass_cut_off_between_its_checkpoints_resumes_at_the_common_one(both):
    """Killed after the first adapter's checkpoint was written and before the second's."""
    high, low = both
    assert checkpoints.plan_passes(both, 2) == [(both, EPOCHS)]
    shutil.rmtree(low.checkpoint(EPOCHS))
    assert checkpoints.plan_passes(both, 2) == [(both, 3)]
    assert checkpoints.plan_passes(both, 1) == [([high], 3), ([low], 3)]
    shutil.rmtree(low.checkpoint(3))
    assert checkpoints.plan_passes(both, 2) == [([high], EPOCHS), ([low], None)]


def test_a_pass_cut_off_at_its_first_checkpoint_begins_again(tmp_path):
    recipe = load_recipe("tiny", num_epochs=EPOCHS)
    pair = [Training.of(recipe.replace(learning_rate=rate), tmp_path) for rate in (1e-4, 1e-7)]
    written(pair[0], 1, companions=pair)
    assert checkpoints.plan_passes(pair, 2) == [(pair, None)]
