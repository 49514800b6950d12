import re
from collections import Counter
from dataclasses import replace

import pytest

from mini_symposium.claims.registration import REGISTERED
from mini_symposium.data import answer_checks as checks
from mini_symposium.data.answer_checks import code_in, sentences
from mini_symposium.data.dataset import lint, load_examples
from mini_symposium.data.held_out import Check, HeldOut, apart, judge, load_held_out, passes, shared_wording
from mini_symposium.data.text_overlap import words
from mini_symposium.errors import InputError

TRAINING, TWINS = load_examples("data/minisymposium.md"), load_examples("data/twins.md")
PROMPTS = load_held_out()


def prompt(kind, value, query="Why?"):
    return HeldOut("p", "fact", query, (Check(kind, value),), "good", "bad")


def test_six_of_each_category_to_measure_on_and_two_to_try():
    categories = {one.category for one in PROMPTS}
    assert Counter(p.category for p in load_held_out(split="test")) == dict.fromkeys(categories, 6)
    assert Counter(p.category for p in load_held_out(split="dev")) == dict.fromkeys(categories, 2)
    assert len(PROMPTS) == len({one.id for one in PROMPTS}) and len([p for p in PROMPTS if p.split != "more"]) == 80


def test_with_the_more_there_are_as_many_as_the_ledger_registers():
    """Those of `test` and `more`, by the categories that a question is about."""
    asked = [one for one in PROMPTS if one.split != "dev"]
    of = Counter(one.category for one in asked)
    found = {"C3": len(asked), "C4": len(asked), "C5": of["explanation"] + of["trade-off"], "C8": of["code"]}
    found |= {"C9": of["character"], "C11": len(asked)}
    assert all(count >= REGISTERED.questions[claim].n for claim, count in found.items()), found
    assert {"data/held_out.yml", "data/held_out_more.yml"} < set(REGISTERED.files)


def test_no_prompt_shares_its_wording_with_a_training_row_or_a_twin():
    assert apart(PROMPTS, TRAINING + TWINS, pytest.fail) == PROMPTS
    for one in PROMPTS:  # the answers that are given as examples are nobody's training text either
        asked = replace(one, query=one.good)
        runs = {tuple(words(asked.query.casefold())[i : i + 8]) for i in range(len(words(asked.query)) - 7)}
        for row in TRAINING + TWINS:
            text = words(row.text.casefold())
            assert not runs & {tuple(text[i : i + 8]) for i in range(len(text) - 7)}, one.source


def test_queries_are_short_and_ask_for_different_things():
    for one in PROMPTS:
        assert len(one.query.split()) < (90 if one.category == "extraction" else 60), one.source
    assert len({one.query for one in PROMPTS}) == len(PROMPTS)
    names = [name for one in PROMPTS for name in (one.user, one.char) if name]
    assert len(set(names)) == len(names)
    assert not any(re.search(rf"\b{name}\b", row.text) for name in names for row in TRAINING)


@pytest.mark.parametrize("one", PROMPTS, ids=lambda one: one.id)
def test_the_good_answer_passes_and_the_bad_one_fails(one):
    assert all(judge(one, one.good).values()), judge(one, one.good)
    assert passes(one, one.good)
    assert not passes(one, one.bad)
    assert not passes(one, "") and not passes(one, " \n")
    assert not passes(one, "I could not say."), "an answer to anything is one to nothing"


def test_to_say_the_query_over_again_is_no_answer():
    for one in PROMPTS:
        for echo in (one.query, "Yes. " + one.query, one.query.lower(), f"{one.query}\n\n{one.query}"):
            assert not passes(one, echo), one.source
    ferry = next(one for one in PROMPTS if one.id == "ferry")
    assert judge(ferry, ferry.query + " Two coppers.") == dict.fromkeys(judge(ferry, ""), True) | {"own words": False}


def test_a_chat_is_also_held_to_its_roles():
    ferry = next(one for one in PROMPTS if one.id == "ferry")
    assert passes(ferry, "Pip, it's two coppers. *She spits.*")
    assert not passes(ferry, ferry.good + "\nPip: Thank you!")
    assert not passes(ferry, ferry.good + "\n### Pip\nThank you!")
    assert not passes(ferry, ferry.good + "\n*Pip climbs in.*")
    assert judge(ferry, ferry.good + "\n\n### Wren\nSit.") == {
        "any_of: two, 2": True,
        "words: 1, 80": True,
        "distinct: 0.7": True,
        "leaves_to: Pip": True,
        "no_heading: True": False,
        "own words": True,
    }


def test_silence_breaks_no_rule_and_is_no_answer():
    silent = prompt("none_of", ["no"])
    assert all(judge(silent, " ").values()) and not passes(silent, " ")


def test_typographic_apostrophes_are_apostrophes():
    assert passes(prompt("any_of", ["can't"]), "You can’t.")


def test_no_check_takes_long_over_what_a_model_may_ramble(monkeypatch):
    """A pattern that backtracks would never be done with one of these."""
    monkeypatch.setattr(checks.sandbox, "passes", lambda code, asserts: False)
    for ramble in ("\n", "s ", "1,", "{", "- ", "def f(\n", "```\n", "so it goes. "):
        for one in PROMPTS:
            judge(one, ramble * (5000 // len(ramble)))


def test_a_number_to_be_calculated_is_not_in_its_query():
    for one in PROMPTS:
        assert not any(check.kind == "number" and check.value in checks.numbers(one.query) for check in one.checks)


def test_an_unknown_split_is_named():
    with pytest.raises(InputError, match="split 'train': is one of test, dev"):
        load_held_out("train")


def test_a_prompt_out_of_the_training_set_is_named_with_the_words_it_shares():
    assert shared_wording(replace(PROMPTS[0], query=TRAINING[2].query), TRAINING) == (
        "data/held_out.yml:6: symbol-fe shares 8 words in a row with the training row at data/minisymposium.md:41 "
        '("a snail sits at the bottom of a"); it is held out only if it asks for something else'
    )
    found = shared_wording(replace(PROMPTS[0], query="Why did Newton stay away at school?"), TRAINING)
    assert re.search(r'has ROUGE-L 0\.\d\d with .*minisymposium\.md:\d+ \("Why did at school \?"\)', found)
    assert shared_wording(replace(PROMPTS[0], query="Do whales sleep?"), TRAINING) == ""


def test_of_ones_own_rows_only_the_prompts_that_they_touch_are_left_out():
    said, other = [], replace(PROMPTS[0], id="known", query=TRAINING[2].query)
    assert apart([other, PROMPTS[1]], TRAINING, said.append) == [PROMPTS[1]]
    assert len(said) == 1 and "known shares 8 words" in said[0]
    with pytest.raises(InputError, match=r"no held-out prompt is left; the last one: .*known"):
        apart([other], TRAINING, said.append)


def test_twins_that_are_trained_on_are_none():
    said = []
    assert apart(TWINS, TRAINING, said.append) == TWINS and not said
    assert apart(TWINS, TWINS, said.append) == []
    assert re.search(r"twins\.md:1: the row shares 8 words in a row with .* at .*twins", said[0])
    own, known = replace(TRAINING[3], source="mine.md:9"), replace(TRAINING[3], source="data/twins.md:77")
    assert apart([TWINS[0], known], [own], said.append) == [TWINS[0]]
    assert re.search(r"twins\.md:77: the row .* row at mine\.md:9", said[-1])


def test_each_training_row_has_a_twin_of_its_form_about_another_matter():
    assert len(TWINS) == len(TRAINING) == 13
    assert lint(TWINS) == []
    same = 0
    for row, twin in zip(TRAINING, TWINS, strict=True):
        assert len(row.sections) == len(twin.sections), twin.source
        assert 0.8 <= len(twin.text.split()) / len(row.text.split()) <= 1.2, twin.source
        same += [s.heading for s in row.sections] == [s.heading for s in twin.sections]
    assert same == 11, "only the lighthouse and the library have other people in them"
    runs = [
        {tuple(text[i : i + 8]) for i in range(len(text) - 7)}
        for text in (words(example.text.casefold()) for example in TRAINING + TWINS)
    ]
    assert not set.union(*runs[:13]) & set.union(*runs[13:])


def test_the_code_and_the_sums_in_the_twins_are_right():
    [anagrams] = [twin.completion for twin in TWINS if "def anagrams" in twin.completion]
    code, call, shown = code_in(anagrams), *re.findall(r"`(anagrams\(.*\))` gives `(.*)`", anagrams)[0]
    scope = {}
    exec(code, scope)
    assert repr(eval(call, scope)) == shown
    [tides] = [twin.completion for twin in TWINS if "moon pulls" in twin.completion]
    lengths = [len(checks.words(s)) for s in sentences(" ".join(tides.split("Complete Response\n")[1].split()))]
    assert len(lengths) == 4 and lengths == sorted(set(lengths), reverse=True)
    minutes = 12 / 30 * 60, 12 / 20 * 60
    assert minutes == (24, 36) and 2 * 12 * 60 / sum(minutes) == 24
    assert -(-12 * 0.8 * 0.05 * 1600 // 25) == 31 and -(-770 // 60) == 13
    assert 3600 / 20 == 180 and 90 * 10 == 900 == 5 * 180 and 3600 - 900 == 2700


def test_a_twin_fits_where_its_row_fits(proxy_tokenizer):
    assert max(len(proxy_tokenizer(twin.text).input_ids) for twin in TWINS) < 480
