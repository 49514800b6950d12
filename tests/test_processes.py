"""A batch is the same batch, however many processes share it."""

import os
import subprocess
import sys

import pytest

from mini_symposium.data.dataset import load_examples
from mini_symposium.recipe import load_recipe
from mini_symposium.run import ROOT, RunDirectory, find

ALONE = """
from mini_symposium.training.finetune import prepare, train
recipe, examples, run = prepare({recipe!r}, {data!r}, {run!r})
train(recipe, examples, run, [1e-3], [], fast=False)
"""


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five examples: the last step of an epoch has but one for two processes."""
    folder = tmp_path_factory.mktemp("five")
    examples = load_examples(find("data/minisymposium.md"))[:5]
    (folder / "five.md").write_text("\n\n".join(example.text for example in examples))
    for batch in (1, 2):
        recipe = load_recipe("tiny", num_epochs=8, gradient_accumulation_steps=batch, learning_rate=1e-3)
        (folder / f"batch-{batch}.yml").write_text(recipe.to_yaml())
    return folder


@pytest.fixture(scope="module")
def alone(nursery, five):
    def trained(batch: int) -> RunDirectory:
        run = five / f"alone-{batch}"
        paths = {"recipe": str(five / f"batch-{batch}.yml"), "data": str(five / "five.md"), "run": str(run)}
        assert nursery.run(ALONE.format(**paths), run)[0] == 0, nursery.said
        return RunDirectory(run)

    return {batch: trained(batch) for batch in (1, 2)}


def test_a_batch_takes_the_mean_of_its_examples_gradients(alone):
    """At the first step, where nothing has moved: no longer than the mean of their lengths, as a sum would be."""
    one, other = (alone[1].metrics(1e-3)[k]["grad_norm"] for k in (0, 1))
    both = alone[2].metrics(1e-3)
    assert [line["step"] for line in both[:6]] == [1, 1, 2, 2, 3, 4]
    assert [line["example"] for line in both] == [line["example"] for line in alone[1].metrics(1e-3)]
    assert both[0]["loss"] == alone[1].metrics(1e-3)[0]["loss"]
    assert abs(one - other) / 2 <= both[0]["grad_norm"] <= 1.05 * (one + other) / 2


def test_two_processes_follow_the_trajectory_of_one_with_the_same_batch(alone, five):
    run = RunDirectory(five / "two")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "data/accelerate/ddp.yaml"]
    launch += ["-m", "mini_symposium", "train"]
    arguments = ["--recipe", five / "batch-2.yml", "--run", run.path, "-p", "LEARNING_RATES=[1e-3]"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = list(map(str, [*launch, *arguments, "-p", f"DATASET={five / 'five.md'}", "-p", "CHECKPOINT_EPOCHS=[4]"]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes") == 1  # one of them speaks
    ours, theirs = run.metrics(1e-3), alone[2].metrics(1e-3)
    assert len(ours) == len(theirs) == 40
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "epoch", "example", "tokens", "learning_rate"):
            assert mine[key] == other[key]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.01
    assert set(run.checkpoints(1e-3)) == {0, 4, 8}


def test_shards_are_refused(nursery, tmp_path):
    code = "import os\nfrom mini_symposium.cli.main import main\nos.environ['ACCELERATE_USE_FSDP'] = 'true'\n"
    code += f"main(['train', '--recipe', 'tiny', '--run', {str(tmp_path / 'run')!r}])"
    assert nursery.run(code, tmp_path)[0] == 2
    assert "saved whole here, not in shards; see data/accelerate/README.md" in nursery.said
