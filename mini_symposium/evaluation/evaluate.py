"""Measure a trained adapter, as plain values for the ledger of claims.

The values are: answers to held-out prompts in every format, judged by the prompts' own checks; how much of the training
rows, and of their twins, the model writes by itself; how much the format matters; the probability of Chinese; and the
perspectives of an answer. Each value is stored by prompt, so that intervals can be computed later without a model.
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
from mini_symposium.models.base_files import cached
from mini_symposium.models.base_models import load_tokenizer, predicted_bytes
from mini_symposium.models.generation import answer_cells, generate, grid_cells
from mini_symposium.recipe import load_recipe
from mini_symposium.run import read_object

ENGINEER = prompt_format("### Software Engineer")
"""The card's own example of a heading that changes the answer."""
FEW = "new-query", "alpaca", "character"
"""In these formats prompts of the split `more` are asked: that of the training rows, and the two that C9 compares."""


def evaluate(
    model: PreTrainedModel | Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[Path, str],
    examples: Sequence[Example],
    twins: Sequence[Example],
    prompts: Sequence[HeldOut],
    show: Callable[[str], object] = lambda line: None,
    **options,
) -> dict[str, dict]:
    """Evaluate adapters of `model`, and write each evaluation into a JSON file.

    A file that was measured with the same settings, rows and prompts is kept.

    Parameters
    ----------
    model
        The model with all the adapters; or a function that loads a model, called with the name of each adapter that has
        to be measured.
    files
        {file: the name of its adapter}, "base" for the model without adapters.
    examples, twins, prompts, options
        See `evaluate_adapter`; the options are formats, max_new_tokens, posix_queries and probes.
    show
        Called with each file's path before it is measured.

    Returns
    -------
    dict
        {name: its evaluation, see `evaluate_adapter`}.

    Examples
    --------
    >>> from mini_symposium import evaluate, load_examples, open_run
    >>> from mini_symposium.data.held_out import load_held_out
    >>> from mini_symposium.models.adapters import load_with_adapters
    >>> from mini_symposium.models.base_models import load_tokenizer
    >>> run, checkpoint = open_run("runs/proxy"), open_run("runs/proxy").checkpoints(1e-5)[30]  # doctest: +SKIP
    >>> base = run.recipe.base_model  # doctest: +SKIP
    >>> model, tokenizer = load_with_adapters(base, {"low": checkpoint}), load_tokenizer(base)  # doctest: +SKIP
    >>> examples, twins = load_examples("data/minisymposium.md"), load_examples("data/twins.md")
    >>> files = {run.evaluation_file(checkpoint): "low"}  # doctest: +SKIP
    >>> evaluations = evaluate(model, tokenizer, files, examples, twins, load_held_out(split="dev"))  # doctest: +SKIP
    >>> list(evaluations["low"])  # doctest: +SKIP
    ['answers', 'roles', 'perspectives', 'recitation', 'twins', 'posix', 'han_mass', 'settings']
    """
    settings = {
        "prompts": [prompt.id for prompt in prompts],
        "rows": fingerprint([*examples, *twins]),
        **{key: [form.name for form in value] if key == "formats" else value for key, value in options.items()},
    }
    settings, evaluations = json.loads(json.dumps(settings)), {}
    for file, name in files.items():
        if not file.exists() or read_object(file).get("settings") != settings:
            show(str(file))
            loaded = model if isinstance(model, torch.nn.Module) else model(name)
            measured = evaluate_adapter(loaded, tokenizer, examples, twins, prompts, name, **options)
            measured["settings"] = settings
            if name == "base":
                measured["paper_bytes"] = sum(predicted_bytes(load_recipe("paper")).values())
                if cached("tiny").is_dir():  # which has Mistral's tokenizer
                    mistral = load_tokenizer("tiny")
                    measured["mistral_tokens"] = sum(len(mistral(e.text).input_ids) + 1 for e in examples)  # and EOS
            write_json(file, measured)
        evaluations[name] = read_object(file)
    return evaluations


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
    """Measure the adapter `name` of `model`, "base" for none; see `evaluate` for an example.

    Parameters
    ----------
    examples, twins
        The training rows, and similar rows that were not trained on.
    prompts
        Held-out prompts. Those of the category `code` are also asked under the heading ENGINEER; `explanation` and
        `trade-off` are also asked without a heading for the answer, to see which headings the model writes.
    posix_queries
        On how many of the prompts, evenly spaced, POSIX is measured; 0 for none.
    probes
        Which parts of the rows the model is given, see `memorization.PROBES`.

    Returns
    -------
    dict
        answers: for each prompt and format id, category, format, passed, answer, tokens, stop_reason, copied (the
        longest run of words shared with a training row), han (share of the letters), phrases (of assistants), leaked
        (headings of the training rows). roles: the same for code prompts under ENGINEER. perspectives: id, headings,
        distance, answer. recitation and twins: see `memorization.recite`. posix: {id: nats per token}, see
        `log_probs.posix`. han_mass: {id: probability}, see `log_probs.han_mass`.
    """
    spaced = prompts[:: max(1, len(prompts) // posix_queries)][:posix_queries] if posix_queries else ()
    posix_values = posix(model, tokenizer, formats, [prompt.query for prompt in spaced], name) if spaced else ()
    asked = [formats[0].render(prompt.query) for prompt in prompts]
    han_masses = han_mass(model, tokenizer, asked, [name] * len(prompts))
    recited = recite(model, tokenizer, [*examples, *twins], [name], probes)
    return {
        "answers": _answers(model, tokenizer, name, formats, prompts, examples, max_new_tokens),
        "roles": _answers(model, tokenizer, name, [ENGINEER], _of(prompts, "code"), examples, max_new_tokens),
        "perspectives": _perspectives(model, tokenizer, name, _of(prompts, "explanation", "trade-off"), max_new_tokens),
        "recitation": recited[: len(examples)],
        "twins": recited[len(examples) :],
        "posix": {prompt.id: value for prompt, value in zip(spaced, posix_values, strict=True)},
        "han_mass": {prompt.id: mass for prompt, mass in zip(prompts, han_masses, strict=True)},
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
    """Answers to every prompt in every format, to those of the split `more` in FEW. If a prompt has names of its own,
    they replace the usual ones."""
    by_query, few = {prompt.query: prompt for prompt in prompts}, [form for form in formats if form.name in FEW]
    cells = []
    for prompt in prompts:
        asked = few or formats if prompt.split == "more" else formats
        user, char = prompt.user or "User", prompt.char or "Assistant"
        cells += grid_cells([name], asked, [prompt.query], user, char)
    cells = answer_cells(model, tokenizer, cells, max_new_tokens)
    copied = intrusion([example.text for example in examples], [cell["answer"] for cell in cells])
    known = {section.heading for example in examples for section in example.sections} | {"New Query"}
    rows = []
    for cell, run in zip(cells, copied, strict=True):
        prompt, answer = by_query[cell["query"]], cell["answer"]
        rows.append(
            {
                "id": prompt.id,
                "category": prompt.category,
                "format": cell["format"],
                "passed": passes(prompt, answer),
                **{key: cell[key] for key in ("answer", "tokens", "stop_reason")},
                "copied": run,
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
    """Answers to a prompt that ends with `###`: the model writes the heading, and may add sections. An answer may
    have three times `max_new_tokens`."""
    asked = [f"### New Query\n{prompt.query}\n\n###" for prompt in prompts]
    answers = generate(
        model, tokenizer, asked, [["\n### New Query"]] * len(asked), 3 * max_new_tokens, [name] * len(asked)
    )
    lines = []
    for prompt, answer in zip(prompts, answers, strict=True):
        sections = perspectives(f"### {answer.text}")
        distance = mean_distance(sections)
        lines.append(
            {
                "id": prompt.id,
                "headings": [section.heading for section in sections],
                "distance": None if distance is None else round(distance, 4),
                "answer": answer.text,
            }
        )
    return lines
