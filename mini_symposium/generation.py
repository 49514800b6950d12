"""Greedy answers, side by side: a whole grid of prompts decodes as one batch, each row with its own stops."""

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from mini_symposium import InputError
from mini_symposium.base_models import device, load_model
from mini_symposium.prompt_formats import PromptFormat


@dataclass(frozen=True)
class Answer:
    """One continuation: `text` without its stop string, and why it ended ("eos", "stop string" or "length")."""

    text: str
    tokens: int
    stop_reason: str


class _StopStrings(StoppingCriteria):
    """End a row when one of its own stop strings shows in what it has generated."""

    LOOK_BACK = 32  # tokens; a stop string is a short line

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[Sequence[str]], prompt_tokens: int):
        self.tokenizer, self.stops, self.prompt_tokens = tokenizer, stops, prompt_tokens

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        start = max(self.prompt_tokens, input_ids.shape[1] - self.LOOK_BACK)
        tails = self.tokenizer.batch_decode(input_ids[:, start:])
        done = [any(stop in tail for stop in stops) for tail, stops in zip(tails, self.stops, strict=True)]
        return torch.tensor(done, device=input_ids.device)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    stops: Sequence[Sequence[str]] | None = None,
    max_new_tokens: int = 128,
) -> list[Answer]:
    """Greedy continuations of `prompts`, decoded as one left-padded batch.

    Parameters
    ----------
    stops
        For each prompt its stop strings; None for none. The model's own EOS always ends a row.

    Returns
    -------
    list of Answer
        In the order of `prompts`.
    """
    if not prompts:
        return []
    stops = [[]] * len(prompts) if stops is None else stops
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    room = getattr(model.config, "max_position_embeddings", None)
    width = batch["input_ids"].shape[1]
    if room and width + max_new_tokens > room:
        raise InputError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the model's {room}; shorten the query"
        )
    model.eval()
    output = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([_StopStrings(tokenizer, stops, width)]),
    )[:, width:]
    return [_answer(tokenizer, row, row_stops) for row, row_stops in zip(output.tolist(), stops, strict=True)]


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> Answer:
    reason = "length"
    if tokenizer.eos_token_id in ids:
        ids, reason = ids[: ids.index(tokenizer.eos_token_id)], "eos"
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [text.index(stop) for stop in stops if stop in text]
    if found:
        text, reason = text[: min(found)], "stop string"
        ids = [i for i in ids if i != tokenizer.pad_token_id]
    return Answer(text.strip(), len(ids), reason)


def load_with_adapters(
    base_model: str,
    checkpoints: Mapping[str, Path],
    load_in_4bit: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """One base with any number of named adapters on it, float32 as they were trained; choose with `using`.

    Raises
    ------
    InputError
        If a checkpoint is not there, is damaged, or belongs to a base of another shape.
    """
    model = load_model(base_model, load_in_4bit, dtype, dequantize=device().type == "cpu")
    for name, checkpoint in checkpoints.items():
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(checkpoint, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, checkpoint, adapter_name=name)
        except Exception as error:  # peft, safetensors and torch raise anything from KeyError to RuntimeError
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{checkpoint}: not an adapter for {base_model} ({reason})") from error
    return model.eval()


@contextmanager
def using(model: PreTrainedModel, name: str):
    """Within the block, `model` answers with the adapter `name`; with "base", without any."""
    if isinstance(model, PeftModel) and name != "base":
        model.set_adapter(name)
    with model.disable_adapter() if isinstance(model, PeftModel) and name == "base" else nullcontext():
        yield model


def answer_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    formats: Sequence[PromptFormat],
    queries: Sequence[str],
    max_new_tokens: int = 128,
    user: str = "User",
    char: str = "Assistant",
) -> list[dict]:
    """Every query in every format from every named adapter ("base" for none): one batch per adapter.

    Returns
    -------
    list of dict
        query, format, model, prompt, answer, tokens, stop_reason, seconds (of the batch that the answer was part of).
    """
    cells = [(query, form) for query in queries for form in formats]
    prompts = [form.render(query, user, char) for query, form in cells]
    stops = [form.stop_strings(user, char) for _, form in cells]
    grid = []
    for name in names:
        started = time.perf_counter()
        with using(model, name):
            answers = generate(model, tokenizer, prompts, stops, max_new_tokens)
        seconds = round(time.perf_counter() - started, 2)
        grid += [
            {
                "query": query,
                "format": form.name,
                "model": name,
                "prompt": prompt,
                "answer": answer.text,
                "tokens": answer.tokens,
                "stop_reason": answer.stop_reason,
                "seconds": seconds,
            }
            for (query, form), prompt, answer in zip(cells, prompts, answers, strict=True)
        ]
    return grid
