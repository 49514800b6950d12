"""The trainer's order, its batches, and adapters of different kinds in one pass."""

import pytest

from mini_symposium.data.dataset import load_examples, tokenize
from mini_symposium.errors import RunError
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.recipe import load_recipe
from mini_symposium.run import Training, find, read_jsonl
from mini_symposium.training.finetune import build_trainer
from mini_symposium.training.log import Log
from mini_symposium.training.memory_plan import choose
from mini_symposium.training.trainer import EpochOrder, check_batches


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny")


@pytest.fixture(scope="module")
def examples():
    return load_examples(find("data/minisymposium.md"))


def test_epochs_are_shuffled_and_the_seed_decides():
    order = EpochOrder(13, [1, 2])
    assert order.order(0) != order.order(1)
    assert order.order(5) == EpochOrder(13, [1]).order(5) != order.order(5, 1)
    order.set_epoch(5)
    assert list(order)[0::2] == order.order(5, 0)
    assert list(order)[1::2] == order.order(5, 1)


def test_the_examples_of_a_step_weigh_one_together_and_each_is_seen_once_an_epoch():
    for examples, batch in ((13, 1), (13, 2), (13, 4), (5, 8), (12, 4)):
        order = EpochOrder(examples, [7], batch)
        places = list(order)
        assert len(places) == len(order) == order.steps * batch
        seen = []
        for step in range(order.steps):
            weights = [order.weight(step + 3 * order.steps, place) for place in range(batch)]
            assert sum(weights) == pytest.approx(1)
            seen += [places[step * batch + place] for place in range(batch) if weights[place]]
        assert seen == order.order(0)


def test_completion_alone_is_supervised_when_the_recipe_says_so(recipe, examples, tmp_path):
    tokenizer = load_tokenizer("tiny")
    rows = tokenize(examples[:2], tokenizer, recipe.sequence_len, completion_only=True)
    built = build_trainer([Training.of(recipe, tmp_path)], rows, tmp_path / "scratch")
    check_batches(built, rows)
    labels = next(iter(built.get_train_dataloader()))["labels"][0]
    row = rows[built.order.order(0)[0]]
    assert (labels == -100).sum() == row.completion_mask.count(0) > 0
    assert labels[-1] == tokenizer.eos_token_id


def test_a_batch_that_is_not_the_row_stops_the_run_before_step_1(recipe, examples, tmp_path):
    rows = tokenize(examples[:2], load_tokenizer("tiny"), recipe.sequence_len, completion_only=False)
    built = build_trainer([Training.of(recipe, tmp_path)], rows, tmp_path / "scratch")
    with pytest.raises(RunError, match="the trainer's batch is not the tokenised row"):
        check_batches(built, rows[::-1])
    for parameter in built.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(RunError, match="not float32"):
        check_batches(built, rows)


def test_ranks_seeds_and_schedules_may_share_a_pass(recipe, examples, tmp_path):
    rows = tokenize(examples, load_tokenizer("tiny"), recipe.sequence_len, completion_only=False)
    two = recipe.replace(num_epochs=2, learning_rate=1e-3)
    recipes = [two, two.replace(lora_r=2, lora_alpha=4, seed=7, lr_scheduler="cosine")]

    def losses(recipes, folder):
        trainings = [Training.of(recipe, tmp_path / folder / str(k)) for k, recipe in enumerate(recipes)]
        chosen = choose(two, len(trainings), 512, 26)
        built = build_trainer(trainings, rows, tmp_path / "scratch", chosen)
        check_batches(built, rows)
        log = Log(built, rows, [2])
        built.add_callback(log)
        built.train()
        return [read_jsonl(training.metrics_file) for training in trainings]

    together = losses(recipes, "together")
    assert [line["example"] for line in together[0]] != [line["example"] for line in together[1]]
    assert together[1][-1]["learning_rate"] < 1e-4 < together[0][-1]["learning_rate"] == 1e-3
    for k in range(2):
        alone = losses(recipes[k : k + 1], f"alone{k}")[0]
        for ours, theirs in zip(together[k], alone, strict=True):
            assert {**ours, "seconds": 0} == pytest.approx({**theirs, "seconds": 0}, rel=1e-3)
