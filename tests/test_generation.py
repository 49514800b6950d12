import pytest
import torch

from mini_symposium import InputError
from mini_symposium.base_models import load_model
from mini_symposium.generation import answer_grid, generate, load_with_adapters, using
from mini_symposium.prompt_formats import FORMATS, prompt_format

PROXY = "SmolLM2-135M-Instruct"
QUERY = "What is the capital of France?"


@pytest.fixture(scope="module")
def model():
    return load_model(PROXY)


def test_the_proxy_answers(model, proxy_tokenizer):
    [answer] = generate(model, proxy_tokenizer, [FORMATS["new-query"].render(QUERY)], max_new_tokens=12)
    assert answer.text.startswith("The capital of France is Paris")


def test_a_grid_answers_as_one_at_a_time(proxy_tokenizer):
    """In float32: in bfloat16 the shape of a batch changes the rounding, and a near tie may fall the other way."""
    model = load_model(PROXY, dtype=torch.float32)
    prompts = [form.render(QUERY) for form in FORMATS.values()]
    stops = [form.stop_strings("User", "Assistant") for form in FORMATS.values()]
    together = generate(model, proxy_tokenizer, prompts, stops, 24)
    alone = [generate(model, proxy_tokenizer, [p], [s], 24)[0] for p, s in zip(prompts, stops, strict=True)]
    assert together == alone
    assert len({answer.text for answer in together}) > 3


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


def test_grid_names_its_cells_and_adapters_differ_from_the_base(tiny_run, mistral_tokenizer):
    adapters = tiny_run.newest_checkpoints()
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


def test_an_adapter_of_another_base_is_refused(tiny_run):
    checkpoints = tiny_run.newest_checkpoints()
    with pytest.raises(InputError, match=f"not an adapter for {PROXY}"):
        load_with_adapters(PROXY, checkpoints)
