"""What an adapter does once it is trained: one measurement for the ledger, of one model, as plain values.

Held-out prompts in every format, whose answers are judged by the prompts' own checks; the training rows, asked to be
recited, with their twins beside them; how much a format matters; Chinese; perspectives. All of it is kept by prompt, so
that intervals can be taken later and without a model.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium.data.dataset import Example, fingerprint
from mini_symposium.data.held_out import HeldOut, passes
from mini_symposium.data.prompt_formats import FORMATS, PromptFormat, prompt_format
from mini_symposium.data.text_overlap import intrusion
from mini_symposium.evaluation.answer_text import assistant_phrases, han_share, leaked, mean_distance, perspectives
from mini_symposium.evaluation.log_probs import han_mass, posix
from mini_symposium.evaluation.memorization import PROBES, recite
from mini_symposium.files.writing import write_json
from mini_symposium.models.base_models import predicted_bytes
from mini_symposium.models.generation import answer_grid, generate
from mini_symposium.recipe import load_recipe
from mini_symposium.run import read_object

ENGINEER = prompt_format("### Software Engineer")
"""The card's own example of a heading that changes the answer."""


def evaluate(
    model: PreTrainedModel | Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[Path, str],
    *material,
    show: Callable[[str], object] = lambda line: None,
    **options,
) -> dict[str, dict]:
    """Evaluate named adapters of `model`, "base" for none, each into its JSON file.

    A file that was measured with the same settings on the same prompts is kept.

    Parameters
    ----------
    model
        With all the adapters; or a function that loads it, given a name, for each file that has to be measured.
    files
        {file: the name of its adapter}.
    material, options
        Of `evaluate_adapter`: examples, twins, prompts; formats, max_new_tokens, posix_queries, probes.
    show
        Called with each file before it is measured.

    Returns
    -------
    dict
        {name: its evaluation, see `evaluate_adapter`}.

    Examples
    --------
    >>> from mini_symposium import evaluate, load_examples, open_run
    >>> run = open_run("runs/proxy")  # doctest: +SKIP
    >>> files = {run.evaluation_file(path): name for name, path in run.newest_checkpoints().items()}  # doctest: +SKIP
    >>> found = evaluate(model, tokenizer, files, examples, twins, prompts)  # doctest: +SKIP
    """
    examples, twins, prompts = material
    settings = {
        "prompts": [prompt.id for prompt in prompts],
        "rows": fingerprint([*examples, *twins]),
        **{key: [form.name for form in value] if key == "formats" else value for key, value in options.items()},
    }
    settings, found = json.loads(json.dumps(settings)), {}
    for file, name in files.items():
        if not file.exists() or read_object(file).get("settings") != settings:
            show(str(file))
            loaded = model if isinstance(model, torch.nn.Module) else model(name)
            measured = evaluate_adapter(loaded, tokenizer, *material, name=name, **options) | {"settings": settings}
            if name == "base":
                measured["paper_bytes"] = sum(predicted_bytes(load_recipe("paper")).values())
            write_json(file, measured)
        found[name] = read_object(file)
    return found


def evaluate_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    twins: Sequence[Example],
    prompts: Sequence[HeldOut],
    name: str = "base",
    formats: Sequence[PromptFormat] = tuple(FORMATS.values()),
    max_new_tokens: int = 96,
    posix_queries: int = 20,
    probes: Sequence[str] = PROBES,
) -> dict:
    """Measure the adapter `name` of `model`; "base" for none.

    Parameters
    ----------
    examples, twins
        The training rows, and rows like them that were not trained on.
    prompts
        Held-out prompts; those of the category `code` are also asked under ENGINEER, `explanation` and `trade-off` also
        without any heading, to see which the model writes.
    posix_queries
        How many of the prompts POSIX is taken over, evenly chosen; 0 for none.
    probes
        Of the rows, see `memorization.PROBES`.

    Returns
    -------
    dict
        answers: a line per prompt and format with id, category, format, passed, answer, tokens, stop_reason, copied
        (the longest run of words from a training row), han (share of letters), phrases (of assistants), leaked
        (headings of the training rows). roles: code prompts under ENGINEER. perspectives: id, headings, distance.
        recitation and twins: see `memorization.recite`. posix: {id: nats a token}. han_mass: {id: probability}.
    """
    chosen = prompts[:: max(1, len(prompts) // posix_queries)][:posix_queries] if posix_queries else ()
    first = formats[0]
    recited = recite(model, tokenizer, [*examples, *twins], [name], probes)
    return {
        "answers": _answers(model, tokenizer, name, formats, prompts, examples, max_new_tokens),
        "roles": _answers(model, tokenizer, name, [ENGINEER], _of(prompts, "code"), examples, max_new_tokens),
        "perspectives": _perspectives(model, tokenizer, name, _of(prompts, "explanation", "trade-off"), max_new_tokens),
        "recitation": recited[: len(examples)],
        "twins": recited[len(examples) :],
        "posix": dict(
            zip(
                [prompt.id for prompt in chosen],
                posix(model, tokenizer, formats, [prompt.query for prompt in chosen], name) if chosen else (),
                strict=True,
            )
        ),
        "han_mass": dict(
            zip(
                [prompt.id for prompt in prompts],
                han_mass(model, tokenizer, [first.render(p.query) for p in prompts], [name] * len(prompts)),
                strict=True,
            )
        ),
    }


def _of(prompts: Sequence[HeldOut], *categories: str) -> list[HeldOut]:
    return [prompt for prompt in prompts if prompt.category in categories]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    formats: Sequence[PromptFormat],
    prompts: Sequence[HeldOut],
    examples: Sequence[Example],
    max_new_tokens: int,
) -> list[dict]:
    """Every prompt in every format; characters speak under their own names."""
    by_query = {prompt.query: prompt for prompt in prompts}
    cells = []
    for names in dict.fromkeys((prompt.user, prompt.char) for prompt in prompts):
        queries = [prompt.query for prompt in prompts if (prompt.user, prompt.char) == names]
        user, char = (given or usual for given, usual in zip(names, ("User", "Assistant"), strict=True))
        cells += answer_grid(model, tokenizer, [name], formats, queries, max_new_tokens, user, char)
    said = [cell["answer"] for cell in cells]
    copied = intrusion([example.text for example in examples], said)
    known = {section.heading for example in examples for section in example.sections} | {"New Query"}
    rows = []
    for cell, words in zip(cells, copied, strict=True):
        prompt, answer = by_query[cell["query"]], cell["answer"]
        rows.append(
            {
                "id": prompt.id,
                "category": prompt.category,
                "format": cell["format"],
                "passed": passes(prompt, answer),
                **{key: cell[key] for key in ("answer", "tokens", "stop_reason")},
                "copied": words.run,
                "han": round(han_share(answer), 4),
                "phrases": assistant_phrases(answer),
                "leaked": leaked(answer, known),
            }
        )
    return rows


def _perspectives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompts: Sequence[HeldOut],
    max_new_tokens: int,
) -> list[dict]:
    """The request, a heading's three signs, and then whatever headings the model writes; three times as many tokens."""
    asked = [f"### New Query\n{prompt.query}\n\n###" for prompt in prompts]
    answers = generate(
        model, tokenizer, asked, [["\n### New Query"]] * len(asked), 3 * max_new_tokens, [name] * len(asked)
    )
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        sections = perspectives(f"### {answer.text}")
        distance = mean_distance(sections)
        found.append(
            {
                "id": prompt.id,
                "headings": [section.heading for section in sections],
                "distance": None if distance is None else round(distance, 4),
                "answer": answer.text,
            }
        )
    return found
