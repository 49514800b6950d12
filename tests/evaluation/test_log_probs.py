from dataclasses import replace

import pytest
import torch
from conftest import using

from mini_symposium.data.prompt_formats import FORMATS, prompt_format
from mini_symposium.evaluation.log_probs import (
    _without_stop_string,
    answer_log_probs,
    han_mass,
    han_pieces,
    posix,
    posix_index,
)
from mini_symposium.models.generation import generate

ENGLISH = "### New Query\nWhat is the capital of China?\n\n### Complete Response\nThe capital of China"
CHINESE = "### New Query\n中国的首都是哪里？\n\n### Complete Response\n中国的首都"


def test_an_answer_has_the_probability_of_its_tokens(overfitted):
    model, tokenizer, examples = overfitted
    prompt, text = examples[0].prompt, examples[0].completion
    before, ids = tokenizer(prompt).input_ids, tokenizer(prompt + text).input_ids
    answer = ids[len(before) :]
    knows, base, none = answer_log_probs(
        model, tokenizer, [prompt] * 3, [answer, answer, []], ["knows", "base", "base"]
    )
    for name, found in (("knows", knows), ("base", base)):
        with using(model, name), torch.inference_mode():
            predicted = model(torch.tensor([ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        expected = sum(predicted[k, i].item() for k, i in enumerate(answer))
        assert found == pytest.approx(expected, rel=1e-4)
    assert none == 0
    assert knows > -0.2 * len(answer) > base


def test_posix_is_0_where_the_prompt_makes_no_difference_and_grows_with_it():
    same = [[-3.0, -8.0], [-3.0, -8.0]]
    assert posix_index(same, [3, 8]) == 0
    assert posix_index([[-3.0, -8.0], [-6.0, -8.0]], [3, 8]) == pytest.approx((3 / 3 + 0) / 2)
    assert posix_index([[-3.0, -8.0], [-6.0, -4.0]], [3, 8]) == pytest.approx((3 / 3 + 4 / 8) / 2)
    likelier = posix_index([[-3.0, -8.0], [-1.0, -8.0]], [2, 8])  # a ratio counts whichever way it goes
    assert likelier == pytest.approx(0.5)
    assert posix_index([[-3.0, 0.0], [-6.0, 0.0]], [3, 0]) == pytest.approx(1)
    assert posix_index([[0.0, 0.0], [0.0, 0.0]], [0, 0]) is None
    assert posix_index([[-1.0]], [1]) is None


def test_a_format_learned_by_heart_is_sensitivity_and_the_same_format_twice_is_none(overfitted):
    model, tokenizer, examples = overfitted
    trained = prompt_format("### Complete Response")
    twice, formats = [trained, replace(trained, name="again")], [trained, FORMATS["vicuna"], FORMATS["bare"]]
    query = [examples[0].query]
    assert posix(model, tokenizer, twice, query, "knows", 12) == [0]
    [knows] = posix(model, tokenizer, formats, query, "knows", 12)
    [base] = posix(model, tokenizer, formats, query, "base", 12)
    assert knows > 1 > base


def test_posix_by_hand(overfitted):
    model, tokenizer, examples = overfitted
    formats, queries = [FORMATS["new-query"], FORMATS["qa"]], [examples[0].query, examples[1].query]
    found = posix(model, tokenizer, formats, queries, "knows", 8)
    for query, value in zip(queries, found, strict=True):
        prompts = [form.render(query) for form in formats]
        stops = [form.stop_strings() for form in formats]
        answers = [
            _without_stop_string(tokenizer, each)
            for each in generate(model, tokenizer, prompts, stops, 8, ["knows"] * 2)
        ]
        xs, ys = [x for x in prompts for _ in answers], [y for _ in prompts for y in answers]
        flat = answer_log_probs(model, tokenizer, xs, ys, ["knows"] * 4)
        by_hand = (abs(flat[1] - flat[3]) / len(answers[1]) + abs(flat[2] - flat[0]) / len(answers[0])) / 2
        assert value == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("tokenizer", ["mistral_tokenizer", "proxy_tokenizer"])
def test_han_pieces_are_those_that_chinese_is_written_with(tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    pieces = set(han_pieces(tokenizer))

    def share(text):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return sum(i in pieces for i in ids) / len(text)

    for text in ("中国的首都是北京", "龘靐齉", "数据"):
        assert 0.5 <= share(text) <= 1  # once a character, however many pieces it is cut into
    for text in (
        "The capital is Paris.",
        "こんにちは",
        "안녕하세요",
        "Привет",
        "Ça va, où?",
        "。、「」",
        "🙂🎻",
        "\n### ",
    ):
        assert share(text) == 0
    assert not pieces & set(tokenizer.all_special_ids)
    assert len(pieces) < 0.1 * len(tokenizer)


def test_after_chinese_more_chinese_is_expected_and_after_english_none(overfitted):
    model, tokenizer, _ = overfitted
    english, chinese = han_mass(model, tokenizer, [ENGLISH, CHINESE], ["base", "base"])
    assert chinese > 0.5
    assert english < 0.001
    with using(model, "base"), torch.inference_mode():
        predicted = model(**tokenizer(CHINESE, return_tensors="pt")).logits[0, -1].softmax(-1)
    assert chinese == pytest.approx(predicted[han_pieces(tokenizer)].sum().item(), rel=1e-3)
