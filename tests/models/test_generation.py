from contextlib import contextmanager
from itertools import pairwise
from threading import Event, Timer

import pytest
import torch
from conftest import using
from peft import LoraConfig, get_peft_model

from mini_symposium.data.prompt_formats import FORMATS, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.models.adapters import load_with_adapters
from mini_symposium.models.base_models import load_model
from mini_symposium.models.generation import MOST_ROWS, Draw, Sampling, answer_grid, generate

PROXY = "SmolLM2-135M-Instruct"
QUERY = "What is the capital of France?"


@pytest.fixture(scope="module")
def model():
    return load_with_adapters(PROXY, {})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The proxy with two adapters that say other things than it does."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    made, folder = (
        get_peft_model(load_model(PROXY, load_in_4bit=False), lora, "left"),
        tmp_path_factory.mktemp("adapters"),
    )
    made.add_adapter("right", lora)
    made.save_pretrained(folder)
    return load_with_adapters(PROXY, {name: folder / name for name in ("left", "right")})


def one_at_a_time(model, tokenizer, prompt, stops, tokens):
    """The model's own `generate`, and what a reader would make of it by hand."""
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**ids, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
    text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in stops), key=len, default=text).strip()


def test_the_proxy_answers(model, proxy_tokenizer):
    [answer] = generate(model, proxy_tokenizer, [FORMATS["new-query"].render(QUERY)], max_new_tokens=12)
    assert answer.text.startswith("The capital of France is Paris")


def test_a_grid_of_formats_and_adapters_answers_as_one_at_a_time(adapted, proxy_tokenizer):
    names, formats = ["base", "left", "right"], list(FORMATS.values())[::2]
    grid = answer_grid(adapted, proxy_tokenizer, names, formats, [QUERY], 12)
    for cell in grid:
        stops = FORMATS[cell["format"]].stop_strings("User", "Assistant")
        with using(adapted, cell["model"]):
            assert cell["answer"] == one_at_a_time(adapted, proxy_tokenizer, cell["prompt"], stops, 12)
    assert len({cell["answer"] for cell in grid}) > 5


def test_short_on_memory_the_batch_is_split_and_the_answers_stay(model, proxy_tokenizer, monkeypatch):
    prompts = [form.render(QUERY) for form in FORMATS.values()]
    whole, widths = generate(model, proxy_tokenizer, prompts, None, 12), []
    with watched(model, widths):
        for free in (0, 40 * 2**20):
            monkeypatch.setattr("mini_symposium.models.generation.memory", lambda free=free: free)
            assert generate(model, proxy_tokenizer, prompts, None, 12) == whole
    assert widths[: len(prompts)] == [1] * len(prompts)
    assert 1 < widths[len(prompts)] < len(prompts)


def test_a_large_batch_is_split_on_a_cpu_and_the_answers_stay_in_order(model, proxy_tokenizer):
    prompts, widths = [f"{number} and {number} is" for number in range(MOST_ROWS + 6)], []
    with watched(model, widths):
        answers = generate(model, proxy_tokenizer, prompts, max_new_tokens=3)
    assert widths == [MOST_ROWS, 6]
    for number in (3, 40, MOST_ROWS + 2):
        [alone] = generate(model, proxy_tokenizer, [prompts[number]], max_new_tokens=3)
        assert alone.ids == answers[number].ids


def test_a_batch_that_ran_out_of_memory_is_halved(model, proxy_tokenizer):
    prompts, widths = [form.render(QUERY) for form in FORMATS.values()], []
    whole = generate(model, proxy_tokenizer, prompts, None, 12)
    with watched(model, widths, most=2):
        assert generate(model, proxy_tokenizer, prompts, None, 12) == whole
    assert widths == [8, 4, 2, 2, 4, 2, 2]
    with watched(model, widths, most=0), pytest.raises(torch.OutOfMemoryError):
        generate(model, proxy_tokenizer, prompts, None, 12)


@contextmanager
def watched(model, widths, most=None):
    """Note the rows of each batch that the model begins, and let memory end at more than `most`."""
    begun = []

    def look(module, arguments, named):
        ids = named["input_ids"]
        if ids.shape[1] > 1 or not begun:
            begun.append(ids)
            widths.append(len(ids))
            if most is not None and len(ids) > most:
                raise torch.OutOfMemoryError("out of memory")

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_rows_are_seen_as_they_grow_and_can_be_stopped(model, proxy_tokenizer):
    prompts, seen = [FORMATS["new-query"].render(QUERY), FORMATS["chatml"].render("Reply with the one word: yes")], []
    last = generate(model, proxy_tokenizer, prompts, None, 12, on_text=seen.append)
    assert len(seen) == max(answer.tokens for answer in last)
    assert [answer.text for answer in last] == seen[-1]
    assert all(late[k].startswith(early[k]) for early, late in pairwise(seen) for k in range(2))
    cut = generate(model, proxy_tokenizer, prompts, None, 12, on_text=lambda texts: "capital" in texts[0])
    assert cut[0].text == "The capital"


def test_each_row_stops_at_its_own_string(model, proxy_tokenizer):
    prompt = FORMATS["new-query"].render(QUERY)
    free, cut = generate(model, proxy_tokenizer, [prompt, prompt], [[], ["France"]], 12)
    assert "France" in free.text
    assert cut.text == free.text[: free.text.index("France")].strip()
    assert cut.stop_reason == "stop string"
    assert cut.tokens < free.tokens


def test_reasons_for_the_end(model, proxy_tokenizer):
    chat = prompt_format("chatml").render("Reply with the one word: yes")
    long, short = (
        generate(model, proxy_tokenizer, [chat, chat], None, 200),
        generate(model, proxy_tokenizer, [chat], None, 1),
    )
    assert long[0].stop_reason == "eos"
    assert short[0].stop_reason == "length"
    assert short[0].tokens == 1


def test_too_long_a_prompt_is_said_before_the_model_runs(model, proxy_tokenizer):
    with pytest.raises(InputError, match="exceed the model's 8192; shorten the query"):
        generate(model, proxy_tokenizer, ["word " * 9000])


def test_grid_names_its_cells_and_adapters_differ_from_the_base(tiny_checkpoint, mistral_tokenizer):
    adapters = {"early": tiny_checkpoint.parent / "epoch-0003", "late": tiny_checkpoint}
    model = load_with_adapters("tiny", adapters)
    formats = [prompt_format("new-query"), prompt_format("### Stack Overflow Solution")]
    grid = answer_grid(model, mistral_tokenizer, ["base", *adapters], formats, ["One?", "Two?"], 4)
    assert len(grid) == 3 * 2 * 2
    assert {(c["model"], c["format"], c["query"]) for c in grid if c["model"] == "base"} == {
        ("base", form.name, query) for form in formats for query in ("One?", "Two?")
    }
    ids = mistral_tokenizer("Hello", return_tensors="pt")
    seen = []
    for name in ("base", *adapters):
        with using(model, name), torch.inference_mode():
            seen.append(model(**ids).logits)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_row_draws_the_same_alone_and_in_a_batch_and_another_seed_draws_another(model, proxy_tokenizer):
    prompts = [form.render(QUERY) for form in list(FORMATS.values())[:3]]
    warm = Sampling(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=7)
    together = generate(model, proxy_tokenizer, prompts, None, 12, sampling=warm)
    assert together == [generate(model, proxy_tokenizer, [p], None, 12, sampling=warm)[0] for p in prompts]
    other = generate(model, proxy_tokenizer, prompts, None, 12, sampling=Sampling(temperature=1.0, seed=8))
    greedy = generate(model, proxy_tokenizer, prompts, None, 12)
    assert len({answer.text for answer in (together[0], other[0], greedy[0])}) == 3
    assert generate(model, proxy_tokenizer, prompts, None, 12, sampling=Sampling()) == greedy
    assert generate(model, proxy_tokenizer, prompts, None, 12, sampling=Sampling(temperature=1.0, top_k=1)) == greedy


def test_draws_follow_the_softmax():
    scores = torch.tensor([[2.0, 1.0, 0.0]])
    drawn = [
        Draw(Sampling(1.0, seed=s), [0])(torch.zeros(1, 1, dtype=torch.long), scores).argmax() for s in range(2000)
    ]
    share = torch.bincount(torch.tensor(drawn), minlength=3) / 2000
    assert torch.allclose(share, scores.softmax(-1)[0], atol=0.04)


@pytest.mark.parametrize(
    ("given", "said"), [({"temperature": -1}, "temperature: -1"), ({"top_p": 0}, "top_p: 0"), ({"top_k": -2}, "top_k")]
)
def test_sampling_out_of_range_is_said(given, said):
    with pytest.raises(InputError, match=said):
        Sampling(**given)


def test_a_stop_from_another_thread_keeps_what_came_and_leaves_no_hooks(adapted, proxy_tokenizer):
    prompts, stop = [form.render(QUERY) for form in FORMATS.values()], Event()
    names = ["base", "left"] * 4
    seen = []
    cut = generate(
        adapted,
        proxy_tokenizer,
        prompts,
        None,
        500,
        names,
        lambda t: seen.append(t) or (len(seen) == 3 and stop.set()),
        stop=stop,
    )
    assert [answer.text for answer in cut] == seen[-1]
    assert {answer.stop_reason for answer in cut} <= {"stopped", "eos"}
    assert "stopped" in {answer.stop_reason for answer in cut}
    hooks = sum(len(module._forward_pre_hooks) for module in adapted.modules())
    stop.clear()
    Timer(0.2, stop.set).start()  # within the pass over a prompt of some seconds
    early = generate(adapted, proxy_tokenizer, ["word " * 1500] * 2, None, 50, ["base", "left"], stop=stop)
    assert [(answer.text, answer.stop_reason) for answer in early] == [("", "stopped")] * 2
    assert sum(len(module._forward_pre_hooks) for module in adapted.modules()) == hooks == 0
