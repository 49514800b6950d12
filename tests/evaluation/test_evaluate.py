"""An evaluation holds every prompt in every format, is written once, and is not measured again. On random weights."""

import json
from dataclasses import replace

import pytest

from mini_symposium.data.dataset import load_examples, tokenize
from mini_symposium.data.held_out import load_held_out, passes
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.data.text_overlap import overlap
from mini_symposium.evaluation.evaluate import evaluate
from mini_symposium.models.adapters import load_with_adapters
from mini_symposium.run import read_object

PROMPTS = [next(p for p in load_held_out() if p.category == c) for c in ("fact", "code", "explanation", "character")]
FORMAT_NAMES = ["new-query", "character"]
SETTINGS = {
    "formats": [FORMATS[name] for name in FORMAT_NAMES],
    "max_new_tokens": 4,
    "posix_queries": 2,
    "probes": ["goldfish"],
}


@pytest.fixture(scope="module")
def rows():
    return [load_examples(f"data/{name}.md")[:1] for name in ("minisymposium", "twins")]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_with_adapters("tiny", {"tuned": tiny_checkpoint})


@pytest.fixture(scope="module")
def measured(model, mistral_tokenizer, rows, tmp_path_factory):
    folder, shown = tmp_path_factory.mktemp("evaluations"), []
    files = {folder / "base.json": "base", folder / "tuned.json": "tuned"}
    found = evaluate(model, mistral_tokenizer, files, *rows, PROMPTS, show=shown.append, **SETTINGS)
    return files, found, shown


def test_every_prompt_is_answered_in_every_format_and_judged_by_its_own_checks(measured, rows, mistral_tokenizer):
    files, found, shown = measured
    assert list(found) == ["base", "tuned"] and shown == list(map(str, files))
    for name, evaluation in found.items():
        answers = evaluation["answers"]
        cells = {(line["id"], line["format"]) for line in answers}
        assert cells == {(prompt.id, form) for prompt in PROMPTS for form in FORMAT_NAMES} and len(answers) == 8
        by_id = {prompt.id: prompt for prompt in PROMPTS}
        for line in answers:
            assert line["passed"] == passes(by_id[line["id"]], line["answer"])
            assert line["copied"] == overlap(rows[0][0].text, line["answer"]).run
            assert line["tokens"] <= 4 and line["category"] == by_id[line["id"]].category
        assert [(line["id"], line["format"]) for line in evaluation["roles"]] == [
            (PROMPTS[1].id, "### Software Engineer")
        ]
        assert [line["id"] for line in evaluation["perspectives"]] == [PROMPTS[2].id]
        assert [line["model"] for line in evaluation["recitation"] + evaluation["twins"]] == [name, name]
        assert list(evaluation["posix"]) == [PROMPTS[0].id, PROMPTS[2].id]
        assert list(evaluation["han_mass"]) == [prompt.id for prompt in PROMPTS]
    assert found["base"]["han_mass"] != found["tuned"]["han_mass"]
    assert ("paper_bytes" in found["base"], "paper_bytes" in found["tuned"]) == (True, False)
    mistrals = tokenize(rows[0], mistral_tokenizer, 512, False)
    assert found["base"]["mistral_tokens"] == sum(len(row.input_ids) for row in mistrals)


def test_more_prompts_are_asked_in_few_formats(model, mistral_tokenizer, rows, tmp_path):
    prompts = [PROMPTS[0], replace(PROMPTS[3], split="more")]
    every = SETTINGS | {"formats": list(FORMATS.values()), "posix_queries": 0}
    found = evaluate(model, mistral_tokenizer, {tmp_path / "a.json": "base"}, *rows, prompts, **every)["base"]
    asked = [[line["format"] for line in found["answers"] if line["id"] == prompt.id] for prompt in prompts]
    assert asked[0] == list(FORMATS) and sorted(asked[1]) == ["alpaca", "character", "new-query"]


def test_a_character_is_asked_under_its_own_name(model, mistral_tokenizer, rows, measured, tmp_path):
    prompt, asked = PROMPTS[3], []
    assert prompt.user and prompt.char
    hook = model.get_base_model().register_forward_pre_hook(
        lambda module, arguments, named: asked.extend(named["input_ids"].tolist()), with_kwargs=True
    )
    evaluate(model, mistral_tokenizer, {tmp_path / "a.json": "base"}, *rows, [prompt], **SETTINGS)
    hook.remove()
    ids = mistral_tokenizer(FORMATS["character"].render(prompt.query, prompt.user, prompt.char))["input_ids"]
    assert any(row[-len(ids) :] == ids for row in asked)


def test_what_was_measured_alike_is_kept_and_read_without_a_model(measured, mistral_tokenizer, rows):
    files, found, _ = measured
    before = {file: file.stat().st_mtime_ns for file in files}

    def load(name):
        raise AssertionError(f"{name} is loaded")

    assert evaluate(load, mistral_tokenizer, files, *rows, PROMPTS, **SETTINGS) == found
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert found["tuned"] == read_object(list(files)[1])


@pytest.mark.parametrize("other", ["prompts", "rows", "settings"])
def test_what_was_measured_otherwise_is_measured_again(model, measured, mistral_tokenizer, rows, tmp_path, other):
    """And only then is the model loaded, by the name of its adapter."""
    examples, twins = rows
    prompts, settings, file = PROMPTS, dict(SETTINGS), tmp_path / "tuned.json"
    file.write_text(list(measured[0])[1].read_text(encoding="utf-8"), encoding="utf-8")
    if other == "prompts":
        prompts = PROMPTS[:1]
    elif other == "rows":
        twins = examples
    else:
        settings["max_new_tokens"] = 3
    loaded = []

    def load(name):
        loaded.append(name)
        return model

    again = evaluate(load, mistral_tokenizer, {file: "tuned"}, examples, twins, prompts, **settings)["tuned"]
    assert loaded == ["tuned"] and again == json.loads(file.read_text(encoding="utf-8"))
    assert again["settings"] != measured[1]["tuned"]["settings"]
