"""Generating answers: many prompts are decoded as one batch, each row with its own adapter and stop strings.

On a CPU answers are computed in float32, and every row gets the same tokens in a batch as alone. A GPU computes in
bfloat16: the shape of the batch changes the rounding, so another token may win where two are nearly tied.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from time import monotonic

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_layers import GradientCheckpointingLayer as DecoderLayer

from mini_symposium.data.prompt_formats import PromptFormat, grid_cells, prompt_format
from mini_symposium.errors import InputError
from mini_symposium.models.adapters import adapter_names, load_with_adapters, mixed, with_base
from mini_symposium.models.base_models import check_embedded, load_tokenizer
from mini_symposium.models.devices import memory, out_of_memory
from mini_symposium.models.strength import at_strength, check_strength
from mini_symposium.run import Resolved, resolve


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen; by default the likeliest. Applied as in transformers, in its order.

    Raises
    ------
    InputError
        If a value is out of its range.
    """

    temperature: float = 0.0
    """0 is greedy; `top_k`, `top_p` and `seed` then have no effect."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities add up to p."""
    repetition_penalty: float = 1.0
    """Divides the score of each token that occurred before, in the prompt too (Keskar et al. 2019); 1: none."""
    seed: int = 0
    """With the same seed a row gets the same tokens, whatever else is in its batch."""

    def __post_init__(self):
        for name, valid, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not valid:
                raise InputError(f"{name}: {getattr(self, name)} must be {expected}")


class Draw(LogitsProcessor):
    """Gives the token drawn by `sampling` the highest score; what a row draws does not depend on its batch.

    Each row has its own random numbers, and its padding does not count as tokens that occurred before. The argmax
    of scores plus Gumbel noise is a draw from their softmax (Maddison et al. 2014, "A* Sampling").

    Parameters
    ----------
    padding
        For each row the number of padding tokens on its left.
    """

    def __init__(self, sampling: Sampling, padding: Sequence[int]):
        self.padding, self.draws = padding, sampling.temperature > 0
        self.generators = [torch.Generator().manual_seed(sampling.seed) for _ in padding]
        steps = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
        if self.draws:
            steps += [TemperatureLogitsWarper(sampling.temperature)]
            steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
            steps += [TopPLogitsWarper(sampling.top_p)]
        self.steps = LogitsProcessorList(steps)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = []
        for ids, row, padding, generator in zip(input_ids, scores, self.padding, self.generators, strict=True):
            row = self.steps(ids[None, padding:], row[None])
            if self.draws:
                row = row - torch.empty(row.shape).exponential_(generator=generator).log().to(row)
            rows.append(row)
        return torch.cat(rows)


SHARE = 0.5
"""The part of the free memory that the keys and values of a batch may fill."""

MOST_ROWS = 64
"""Maximum batch size on a CPU. Each token copies the keys and values; with more rows the copies are too large for the
allocator to reuse, and half the time goes into asking the system for memory."""


@dataclass(frozen=True)
class Answer:
    """The continuation of one prompt."""

    text: str
    """Without its stop string."""
    tokens: int
    stop_reason: str
    """"eos", "stop string", "length" (as many tokens as allowed), or "stopped" (by the caller)."""
    ids: tuple[int, ...] = ()
    """Its tokens before EOS, including those of a stop string."""
    seconds: float = field(default=0.0, compare=False)
    """From the start of the batch to the end of this answer."""


class _StopStrings(StoppingCriteria):
    """Called after each token: ends the rows that have one of their stop strings, and calls `grown` with all rows'
    tokens so far, which ends the batch if it returns true."""

    LOOK_BACK = 32  # tokens; stop strings are short

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[Sequence[str]], prompt_tokens: int, grown):
        self.tokenizer, self.stops, self.prompt_tokens, self.grown = tokenizer, stops, prompt_tokens, grown
        self.started, self.ended = monotonic(), [None] * len(stops)

    def seconds(self) -> list[float]:
        """The seconds that each row has taken until it ended, or until now."""
        return [(monotonic() if ended is None else ended) - self.started for ended in self.ended]

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        start = max(self.prompt_tokens, input_ids.shape[1] - self.LOOK_BACK)
        tails = self.tokenizer.batch_decode(input_ids[:, start:])
        done = [any(stop in tail for stop in stops) for tail, stops in zip(tails, self.stops, strict=True)]
        at_eos = (input_ids[:, -1] == self.tokenizer.eos_token_id).tolist()
        for row in range(len(done)):
            if self.ended[row] is None and (done[row] or at_eos[row]):
                self.ended[row] = monotonic()
        if self.grown and self.grown(input_ids[:, self.prompt_tokens :].tolist()):
            done = [True] * len(done)
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def _steady_products():
    """Within the block oneDNN multiplies float32 matrices on a CPU: it adds up a row in the same order in a batch of
    any size, and is faster than MKL.

    PyTorch uses oneDNN for them only if bfloat16 is allowed. On a processor that multiplies bfloat16, oneDNN would then
    round the inputs, and a quarter of greedy answers would change (`make bench ONLY=grid`); there MKL stays in use.
    """
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        yield
        return
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Stopped(Exception):
    """Raised to leave a forward pass."""


@contextmanager
def _stoppable(model: PreTrainedModel, stop: Event | None):
    """Within the block `stop` ends a forward pass at the next layer: over a long prompt one pass takes seconds.

    Afterwards its hooks are removed, and also PEFT's hooks for each row's adapter, which PEFT leaves if a pass raises.
    """

    def check(*_) -> None:
        if stop.is_set():
            raise _Stopped

    before = {module: set(module._forward_pre_hooks) for module in model.modules()}
    for module in before if stop else ():
        if isinstance(module, DecoderLayer):
            module.register_forward_pre_hook(check)
    try:
        yield
    finally:
        for module, kept in before.items():
            for hook in set(module._forward_pre_hooks) - kept:
                del module._forward_pre_hooks[hook]
                module._forward_pre_hooks_with_kwargs.pop(hook, None)


def _rows_that_fit(model: PreTrainedModel, tokens: int, free: int) -> int:
    """Rows of `tokens` tokens that fit into `free` bytes. Keys and values count twice: they are copied to grow. Eager
    attention also makes maps of tokens x tokens for each head: scores and probabilities, in float32."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * tokens * model.dtype.itemsize
    eager = config._attn_implementation == "eager"
    maps = 3 * 4 * config.num_attention_heads * tokens**2 if eager else 0
    return max(1, int(SHARE * free / (2 * cache + maps + 12 * config.vocab_size)))


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    stops: Sequence[Sequence[str]] | None = None,
    max_new_tokens: int = 128,
    adapters: Sequence[str] | None = None,
    on_text: Callable[[list[str]], object] | None = None,
    sampling: Sampling | None = None,
    stop: Event | None = None,
) -> list[Answer]:
    """Continue `prompts`, greedily or as `sampling` says, as one left-padded batch; as several if memory is short.

    Parameters
    ----------
    prompts
        Texts; or token ids, with BOS where the model wants one: cutting a text can change its tokens, so a cut row is
        given as ids.
    stops
        For each prompt its stop strings, if any. EOS always ends a row.
    adapters
        For each prompt its adapter, or "base"; if None, the active adapter for all.
    on_text
        Called after each token with the text of every row so far. If it returns true, the generation ends.
    stop
        If another thread sets it, the generation ends within a layer; the text so far is kept.

    Returns
    -------
    list of Answer
        In the order of `prompts`.

    Raises
    ------
    InputError
        If a prompt and its continuation exceed the model's context.
    """
    if not prompts:
        return []
    stops = [[]] * len(prompts) if stops is None else stops
    ids = [tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    room, known = getattr(model.config, "max_position_embeddings", None), len(model.get_input_embeddings().weight)
    width = max(map(len, ids))
    check_embedded((i for row in ids for i in row), known, tokenizer, "the prompt")
    if room and width + max_new_tokens > room:
        raise InputError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the model's {room}; shorten the query"
        )
    model.eval()
    answers = [Answer("", 0, "stopped")] * len(prompts)
    stopped = False

    def decode(rows: list[int]) -> None:
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt").to(model.device)
        start = batch["input_ids"].shape[1]

        def keep(generated: list[list[int]], cut: str) -> None:
            for row, tokens, seconds in zip(rows, generated, criterion.seconds(), strict=True):
                reason = cut if len(tokens) < max_new_tokens else "length"
                answers[row] = _answer(tokenizer, tokens, stops[row], reason, seconds)

        def grown(generated: list[list[int]]) -> bool:
            nonlocal stopped
            keep(generated, "stopped")  # overwritten after the next token, if there is one
            stopped = bool(on_text and on_text([answer.text for answer in answers])) or bool(stop and stop.is_set())
            return stopped

        criterion = _StopStrings(tokenizer, [stops[row] for row in rows], start, (on_text or stop) and grown)
        draw = [Draw(sampling, [start - len(ids[row]) for row in rows])] if sampling else []
        chosen = None if adapters is None else [adapters[row] for row in rows]
        output = model.generate(
            **batch,
            **adapter_names(model, chosen),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([criterion]),
            logits_processor=LogitsProcessorList(draw),
        )
        keep(output[:, start:].tolist(), "stopped" if stopped else "length")

    fit = _rows_that_fit(model, width + max_new_tokens, memory())
    fit = min(fit, MOST_ROWS) if model.device.type == "cpu" else fit
    ordered = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # rows of similar length need little padding
    waiting = [ordered[first : first + fit] for first in range(0, len(ordered), fit)]
    with _steady_products():
        while waiting and not stopped:
            rows = waiting.pop(0)
            try:
                with _stoppable(model, stop):
                    decode(rows)
            except _Stopped:
                stopped = True
            except RuntimeError as error:
                if len(rows) == 1 or not out_of_memory(error):
                    raise
                waiting[:0] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return answers


def _answer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str], reason: str, seconds: float
) -> Answer:
    if tokenizer.eos_token_id in ids:
        ids, reason = ids[: ids.index(tokenizer.eos_token_id)], "eos"
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if starts := [text.index(stop) for stop in stops if stop in text]:
        text, reason = text[: min(starts)], "stop string"
        ids = [i for i in ids if i != tokenizer.pad_token_id]
    return Answer(text.strip(), len(ids), reason, tuple(ids), seconds)


def answer_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    formats: Sequence[PromptFormat],
    queries: Sequence[str],
    max_new_tokens: int = 128,
) -> list[dict]:
    """Ask every query in every format of every named adapter ("base" for none), as one batch; see `generate`.

    Returns
    -------
    list of dict
        model, format, query, prompt, answer, tokens, stop_reason; by model, then query, then format.
    """
    return answer_cells(model, tokenizer, grid_cells(names, formats, queries), max_new_tokens)


def answer_cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cells: Sequence[Mapping], max_new_tokens: int
) -> list[dict]:
    """As `answer_grid`, for the cells of one or more grids, see `grid_cells`."""
    prompts, adapters, stops = ([cell[key] for cell in cells] for key in ("prompt", "model", "stops"))
    cells = [{key: value for key, value in cell.items() if key != "stops"} for cell in cells]
    answers = generate(model, tokenizer, prompts, stops, max_new_tokens, adapters)
    return [
        {**cell, "answer": answer.text, "tokens": answer.tokens, "stop_reason": answer.stop_reason}
        for cell, answer in zip(cells, answers, strict=True)
    ]


def ask(
    model_or_run: str | Path | Resolved,
    query: str,
    formats: Sequence[str | PromptFormat] = ("new-query", "alpaca", "chatml", "bare"),
    max_new_tokens: int = 128,
    strengths: Sequence[float] = (1,),
) -> list[dict]:
    """One query in several prompt formats, from a base and the newest checkpoint of each learning rate of a run.

    Parameters
    ----------
    model_or_run
        A run directory, a model directory, an adapter's folder, or `tiny`, `proxy`, `paper` for their base.
    formats
        As `prompt_formats.prompt_format` takes them.
    strengths
        How much of each adapter is added, see `strength.check_strength`; each gives answers of its own.

    Returns
    -------
    list of dict
        As `answer_grid` gives them; a strength other than 1 is in the model's name.

    Raises
    ------
    InputError
        If there is no such run, model or format, or no adapter that could have another strength.

    Examples
    --------
    >>> from mini_symposium import ask
    >>> [(cell["model"], cell["format"]) for cell in ask("tiny", "Why?", ["### Gardener"], max_new_tokens=1)]
    [('base', '### Gardener')]
    """
    chosen = [prompt_format(form) if isinstance(form, str) else form for form in formats]
    kinds = ("recipe", "adapter", "run", "model")
    source = model_or_run if isinstance(model_or_run, Resolved) else with_base(resolve(model_or_run, *kinds))
    checkpoints = source.run.offered_checkpoints() if source.kind == "run" else {}
    checkpoints |= {path.name: path for path in source.checkpoints}
    named = {at_strength(name, check_strength(s)): {name: s} for name in checkpoints for s in strengths}
    if not checkpoints and [*strengths] != [1]:
        raise InputError(f"{source.base_model}: has no adapter, so there is no strength to change")
    model = load_with_adapters(source.base_model, checkpoints, source.load_in_4bit)
    with mixed(model, {name: parts for name, parts in named.items() if name not in checkpoints}):
        names = ["base", *named]
        return answer_grid(model, load_tokenizer(source.base_model), names, chosen, [query], max_new_tokens)
