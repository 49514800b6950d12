import json
import shutil

import pytest
from html_page import Page
from reciting import FOREIGN, HOSTILE

from mini_symposium.data.prompt_formats import FORMATS, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.models.merge import merge
from mini_symposium.playground import cards
from mini_symposium.playground.workbench import Workbench
from mini_symposium.run import RunDirectory

PICTURE, SKY = "Show me a picture.", "Why is the sky blue?"


@pytest.fixture(scope="module")
def bench(reciting_run) -> Workbench:
    return Workbench(str(reciting_run.path))


def ask(bench, query=PICTURE, formats=("new-query",), models=("base",), tokens=40, **more):
    return bench.ask(bench.cells(query, [prompt_format(name) for name in formats], models), tokens, **more)


def test_formats_and_checkpoints_answer_as_one_grid_and_recitation_grows_by_epoch(bench):
    epochs = bench.shelf.trainings["1e-03"]
    assert list(epochs) == [0, 1, 2]
    seen = []
    found = ask(bench, models=["base", *epochs.values()], on_text=lambda texts: seen.append(texts))
    assert [cell["model"] for cell in found] == ["base", *epochs.values()]
    assert found[0]["answer"].startswith(HOSTILE[:40])
    assert (found[0]["row"], found[0]["recited"]) == ("row 1", 1.0)
    assert found[0]["answer"] == found[-1]["answer"]
    assert found[1]["recited"] < 0.5
    assert seen[-1] == [cell["answer"] for cell in found]
    assert bench.log[-1]["cells"] == found
    sky = ask(bench, SKY)[0]
    assert sky["answer"] == FOREIGN
    assert sky["drift"] > 0.2


def test_a_merged_model_is_chosen_beside_the_checkpoint_that_it_came_from_and_says_the_same(tiny_checkpoint, tmp_path):
    run = RunDirectory(shutil.copytree(tiny_checkpoint.parents[2], tmp_path / "run"))
    merge(tiny_checkpoint, "tiny", run.merged(1e-3, 6), "nf4")
    shelf = Workbench(str(run.path))
    name = "1e-03/epoch-6"
    assert f"{name}/merged" in shelf.shelf.merged and f"{name}/merged" not in shelf.shelf.offered()
    found = ask(shelf, SKY, ["new-query", "alpaca"], ["base", name, f"{name}/merged"], 8)
    by_model = {model: [cell["answer"] for cell in found if cell["model"] == model] for model in shelf.shelf.models}
    assert by_model[f"{name}/merged"] == by_model[name] != by_model["base"]


def test_the_inspector_shows_the_very_tokens(bench, mistral_tokenizer):
    bench.load()
    prompt = FORMATS["new-query"].render(PICTURE)
    tokens = bench.inspect(prompt)
    assert [token.id for token in tokens] == mistral_tokenizer(prompt)["input_ids"]
    assert (tokens[0].text, tokens[0].special) == ("<s>", True)
    assert "".join(token.text for token in tokens[1:]).lstrip("·") == prompt.replace("\n", "⏎").replace(" ", "·")
    page = Page(cards.inspector({"format": "a", "model": "b", "prompt": prompt}, tokens))
    assert prompt in page.text
    assert f"{len(tokens)} tokens, 1 special" in page.text


def test_a_chat_goes_on_in_two_formats(bench):
    talk = [
        {"role": "user", "content": PICTURE},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": SKY},
    ]
    cells = bench.chat("base", [(FORMATS["character"], talk), (FORMATS["alpaca"], talk)], "Ada", "Noor")
    assert cells[0]["prompt"].endswith(f"### Ada\n{SKY}\n\n### Noor\n")
    assert "### Instruction" in cells[1]["prompt"]
    assert len(bench.ask(cells, 8)) == 2


@pytest.mark.parametrize(
    ("query", "formats", "models", "said"),
    [
        ("word " * 20_000, ["bare"], ["base"], "100,000 characters; at most 20,000"),
        (" ", ["bare"], ["base"], "query is empty"),
        ("Why?", [], ["base"], "no format is chosen"),
        ("Why?", ["bare"], [], "no model is chosen"),
        ("Why?", ["bare"], ["1e-9/epoch-3"], "no such model; there is base, 1e-03/epoch-0"),
        ("Why?", ["bare"], ["1e-03/epoch-0 x nan"], "strength nan: takes 0"),
        ("Why?", ["bare"], ["1e-03/epoch-0 x 0.5 + 1e-03/epoch-1 x 100"], "strength 100: takes 0"),
        ("Why?", ["bare"], ["1e-03/epoch-0 x much"], "epoch-0 x much: could not convert"),
        ("Why?", ["bare"], ["base x 0.5"], "only an adapter has a strength"),
    ],
)
def test_what_cannot_be_asked_is_said(bench, query, formats, models, said):
    with pytest.raises(InputError, match=said):
        ask(bench, query, formats, models)


def test_a_second_question_meanwhile_is_refused(bench):
    refused = []

    def meanwhile(texts):
        if not refused:
            for act in (lambda: ask(bench), lambda: bench.open("tiny")):
                with pytest.raises(InputError, match="busy"):
                    act()
                refused.append(act)

    ask(bench, on_text=meanwhile)
    assert len(refused) == 2
    assert ask(bench)[0]["recited"] == 1


def test_what_is_gone_or_does_not_belong_is_said_and_the_rest_still_answers(bench, reciting_run, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(reciting_run.path, run)
    mine = Workbench(str(run))
    checkpoint = mine.shelf.models["1e-03/epoch-1"]
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"epoch-0001: no adapter_model\.safetensors"):
        ask(mine, models=["1e-03/epoch-1"])
    config = mine.shelf.models["1e-03/epoch-2"] / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": "meta/other"}))
    with pytest.raises(InputError, match="was trained on meta/other"):
        ask(mine, models=["1e-03/epoch-2"])
    config.write_text(json.dumps({**values, "r": 3}))
    with pytest.raises(InputError, match="not an adapter for"):
        ask(mine, models=["1e-03/epoch-2"])
    shutil.rmtree(run)
    assert ask(mine)[0]["recited"] == 1


def test_a_run_that_is_not_there_is_an_error_or_trouble_to_show(reciting_run):
    with pytest.raises(InputError, match="a run"):
        Workbench(str(reciting_run.path / "nowhere"))
    assert "a run" in Workbench(str(reciting_run.path / "nowhere"), strict=False).trouble
