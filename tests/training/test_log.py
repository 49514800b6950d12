"""What a training writes as it goes."""

import pytest

from mini_symposium.data.dataset import load_examples, tokenize
from mini_symposium.errors import RunError
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, Training, find
from mini_symposium.training import finetune
from mini_symposium.training.log import Log


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny")


@pytest.fixture(scope="module")
def examples():
    return load_examples(find("data/minisymposium.md"))


def test_a_loss_that_is_no_number_names_the_example(recipe, examples, tmp_path):
    rows = tokenize(examples[:2], load_tokenizer("tiny"), recipe.sequence_len, completion_only=False)
    log = Log(finetune.build_trainer([Training.of(recipe, tmp_path)], rows, tmp_path / "scratch"), rows, [0])
    with pytest.raises(RunError, match=r"step 1: the loss of .*minisymposium\.md:\d+ is nan at learning rate 1e-07"):
        log.write(1, 0, float("nan"), [True], 1.0, recipe.learning_rate, 0.1)
    with pytest.raises(RunError, match=r"step 1: the learning rate is 0\.1"):
        log.write(1, 0, 1.0, [True], 1.0, 0.1, 0.1)
    with pytest.raises(RunError, match=r"has a gradient of inf at learning rate 1e-07; the newest checkpoint is from"):
        log.write(1, 0, 1.0, [True], float("inf"), recipe.learning_rate, 0.1)


def test_of_a_row_that_is_not_all_supervised_only_what_is_can_be_told(recipe, examples, tmp_path):
    run = RunDirectory(tmp_path)
    finetune.train(recipe.replace(num_epochs=3, train_on_inputs=False), examples[:1], run, [1e-2])
    assert {"em", "es"} < run.metrics(1e-2)[0].keys() and "run" not in run.metrics(1e-2)[0]


def test_em_grows_as_a_row_is_learned(recipe, examples, tmp_path):
    run = RunDirectory(tmp_path)
    finetune.train(recipe.replace(num_epochs=40), examples[:1], run, [1e-2])
    em = [line["em"] for line in run.metrics(1e-2)]
    assert em[0] < 0.05
    assert max(em) > 0.5
