"""The grid of a sweep: what it holds, and what is refused."""

import pytest

from mini_symposium.errors import InputError
from mini_symposium.recipe import load_recipe
from mini_symposium.training.experiments import grid


def test_the_grid_is_the_product_in_bounded_passes_equal_ranks_together():
    passes = grid(load_recipe("proxy"), [1e-3, 1e-4], [(64, 32), 4], ["constant", "cosine"], [1, 2], 5, 6)
    trainings = [training for group in passes for training in group]
    assert [len(group) for group in passes] == [6, 6, 4]
    assert len({training.run for training in trainings}) == 16
    assert [training.lora_r for training in trainings] == [4] * 8 + [64] * 8
    recipe = trainings[-1].recipe
    assert (recipe.lora_r, recipe.lora_alpha, recipe.lr_scheduler) == (64, 32, "cosine")
    assert (recipe.learning_rate, recipe.seed, recipe.num_epochs) == (1e-4, 2, 5)


def test_rates_that_differ_in_their_last_digits_have_folders_of_their_own():
    (group,) = grid(load_recipe("proxy"), [1e-3, 1.0000001e-3])
    assert len({training.run for training in group}) == 2


@pytest.mark.parametrize(
    "values, said",
    [
        ({"learning_rates": [1e-3, 0.001]}, "--learning-rates: 0.001 more than once"),
        ({"ranks": [4, (4, 8)]}, "--ranks"),
        ({"ranks": [0]}, "lora_r: 0: must be at least 1"),
        ({"learning_rates": [-1.0]}, "learning_rate: -1.0"),
        ({"learning_rates": [float("nan")]}, "learning_rate: nan: takes a finite number"),
        ({"schedules": ["cosin"]}, "is one of constant, constant_with_warmup, cosine, linear"),
        ({"epochs": 0}, "num_epochs: 0"),
        ({"seeds": [-1]}, "seed: -1"),
        ({"per_pass": 0}, "--per-pass 0"),
    ],
)
def test_a_value_that_no_recipe_has_is_refused(values, said):
    with pytest.raises(InputError, match=said):
        grid(load_recipe("proxy"), **values)
