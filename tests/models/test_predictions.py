"""Batches of sequences and adapters are predicted as each sequence alone, by the model's own forward pass."""

import math
from contextlib import contextmanager

import pytest
import torch
from conftest import using

from mini_symposium.errors import InputError
from mini_symposium.models.adapters import load_with_adapters
from mini_symposium.models.predictions import COMPARED, compare, logits, predict

SEQUENCES = [[1, 5, 9, 12], [1, 7], [1, 20, 21, 22, 23, 24, 25], [1, 5, 9]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """In float32: in bfloat16 a batch rounds otherwise than a row alone."""
    checkpoints = {"first": tiny_checkpoint, "second": tiny_checkpoint.parent / "epoch-0003"}
    return load_with_adapters("tiny", checkpoints, dtype=torch.float32)


def alone(model, ids, name):
    with using(model, name), torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


@contextmanager
def batches(model):
    """The shapes of the batches that the model is given."""
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, arguments, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""
    return lambda size: monkeypatch.setattr("mini_symposium.models.predictions.memory", lambda: size)


@pytest.mark.parametrize(("size", "expected"), [(2**40, [(4, 7)]), (0, [(1, 7), (1, 4), (1, 3), (1, 2)])])
def test_a_batch_of_sequences_and_adapters_is_predicted_as_each_alone(model, free, size, expected):
    names = ["base", "first", "second", "first"]
    free(size)
    with batches(model) as shapes:
        found = dict(predict(model, SEQUENCES, names))
    assert shapes == expected and found.keys() == set(range(4))
    for k, name in enumerate(names):
        torch.testing.assert_close(found[k], alone(model, SEQUENCES[k], name), rtol=0, atol=1e-4)
    assert (found[3] - alone(model, SEQUENCES[3], "base")).abs().max() > 1e-3


def test_short_on_memory_those_of_like_length_share_a_batch(model, free):
    free(2 * 7 * 32_000 * (4 + 8) * 4)
    with batches(model) as shapes:
        order = [k for k, _ in predict(model, SEQUENCES)]
    assert shapes == [(2, 7), (2, 3)] and order == [2, 0, 3, 1]


def test_a_batch_size_keeps_the_order(model, free):
    free(0)
    with batches(model) as shapes:
        order = [k for k, _ in predict(model, SEQUENCES, batch_size=3)]
    assert shapes == [(3, 7), (1, 3)] and order == [0, 1, 2, 3]


def test_at_some_places_the_predictions_are_those_of_all_places(model):
    places = [[0, 3], [1], [2, 4, 6], []]
    for k, predicted in predict(model, SEQUENCES, places=places):
        whole = alone(model, SEQUENCES[k], "first")
        assert predicted.shape == (len(places[k]), 32_000)
        torch.testing.assert_close(predicted, whole[places[k]], rtol=0, atol=1e-4)


def test_too_long_a_sequence_is_refused(model):
    room = model.config.max_position_embeddings
    with pytest.raises(InputError, match=f"a row of {room + 1} tokens exceeds the model's {room}; shorten it"):
        next(predict(model, [[1], [1] * (room + 1)]))
    assert list(predict(model, [])) == []


def test_texts_and_tokens_are_compared_in_batches_that_do_not_depend_on_memory(model, mistral_tokenizer, free):
    texts = ["Why?", mistral_tokenizer("Why?")["input_ids"]] * 7
    with batches(model) as shapes:
        found = logits(model, mistral_tokenizer, texts)
        free(0)
        assert all(map(torch.equal, found, logits(model, mistral_tokenizer, texts)))
    assert shapes == [(COMPARED, 3), (2, 3)] * 2
    assert torch.equal(found[0], found[1]) and found[0].shape == (3, 32_000)


def test_how_far_predictions_are_apart_by_hand():
    p, q = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(3), 0.0]])
    kl = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert compare([p], [q]) == pytest.approx({"largest": math.log(3), "kl": kl, "same_choice": 0})
    assert compare([p, p], [q, p]) == pytest.approx({"largest": math.log(3), "kl": kl / 2, "same_choice": 0.5})
    shifted = compare([p], [p + 5])  # a constant changes logits and no probability
    assert shifted == pytest.approx({"largest": 5, "kl": 0, "same_choice": 1}, abs=1e-6)
    with pytest.raises(ValueError):
        compare([p], [])
