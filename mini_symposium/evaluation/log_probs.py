"""Probabilities of answers and of Chinese, and how much the prompt's format changes an answer's (POSIX).

All are computed from logits, see `predictions.predict`.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mini_symposium.data.prompt_formats import PromptFormat
from mini_symposium.data.text_overlap import HAN
from mini_symposium.models.generation import Answer, generate
from mini_symposium.models.predictions import predict


def answer_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[Sequence[int]],
    adapters: Sequence[str] | None = None,
) -> list[float]:
    """log P(answer | prompt) of each prompt and its answer: in nats, summed over the answer's tokens.

    Parameters
    ----------
    answers
        Token ids without EOS, as in `generation.Answer.ids`.
    adapters
        For each prompt its adapter, or "base"; if None, the active one.

    Raises
    ------
    InputError
        If a prompt and its answer exceed the model's context.
    """
    log_probs, prompt_ids = [0.0] * len(prompts), [tokenizer(prompt).input_ids for prompt in prompts]
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompt_ids, answers, strict=True)]
    for k, logits in predict(model, sequences, adapters):
        predicted = logits[len(prompt_ids[k]) - 1 : -1].log_softmax(-1)
        ids = torch.tensor(answers[k], dtype=torch.long, device=logits.device)
        log_probs[k] = predicted.gather(1, ids[:, None]).double().sum().item()
    return log_probs


def posix_index(log_p: Sequence[Sequence[float]], tokens: Sequence[int]) -> float | None:
    """POSIX of one query in several formats (Chatterjee et al. 2024), in nats per token; 0 if the format has no effect.

    The mean over ordered pairs of prompts i, j of |log(P(y_j | x_i) / P(y_j | x_j))| / length of y_j.

    Parameters
    ----------
    log_p
        (N, N): log P(y_j | x_i) in row i, column j; y_j is the answer to prompt x_j.
    tokens
        (N,): the answers' lengths. Empty answers are left out: they have no probability to compare.

    Returns
    -------
    float or None
        None if all answers are empty, or there is only one prompt.

    >>> posix_index([[-2.0, -9.0], [-4.0, -3.0]], [2, 3])
    1.5
    """
    table, length = np.asarray(log_p, dtype=float), np.asarray(tokens, dtype=float)
    answered, n = length > 0, len(length)
    if n < 2 or not answered.any():
        return None
    ratios = np.abs(table - table.diagonal())[:, answered] / length[answered]
    return float(ratios.sum() / (answered.sum() * (n - 1)))


def posix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    formats: Sequence[PromptFormat],
    queries: Sequence[str],
    name: str = "base",
    max_new_tokens: int = 32,
) -> list[float | None]:
    """POSIX of each query over `formats`, see `posix_index`; the adapter `name` answers greedily, "base" for none.

    Answers count without their stop strings, which are unlikely in other formats. An answer that a model gives
    in several formats is scored once for each prompt. N formats and Q queries make up to Q x N x N rows: keep both
    small.
    """
    prompts = [form.render(query) for query in queries for form in formats]
    stops = [form.stop_strings() for form in formats] * len(queries)
    answers = generate(model, tokenizer, prompts, stops, max_new_tokens, [name] * len(prompts))
    ids, n = [_without_stop_string(tokenizer, answer) for answer in answers], len(formats)
    groups = [range(start, start + n) for start in range(0, len(prompts), n)]
    pairs = list(dict.fromkeys((prompts[i], ids[j]) for group in groups for i in group for j in group if ids[j]))
    xs, ys = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    scored = answer_log_probs(model, tokenizer, xs, ys, [name] * len(pairs))
    log_p = dict(zip(pairs, scored, strict=True))
    return [
        posix_index(
            [[log_p.get((prompts[i], ids[j]), 0.0) for j in group] for i in group], [len(ids[j]) for j in group]
        )
        for group in groups
    ]


def _without_stop_string(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> tuple[int, ...]:
    """An answer's tokens without those of its stop string."""
    ids = list(answer.ids)
    while ids and tokenizer.decode(ids[:-1], skip_special_tokens=True).strip().startswith(answer.text):
        ids.pop()
    return tuple(ids)


def han_pieces(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that write Han: whole characters, or the beginning of one.

    Byte-level BPE cuts characters into bytes. In UTF-8 the bytes E4 to E9 occur only as the first byte of U+4000 to
    U+9FFF, which are Han except for 64 hexagrams. So a token with one of these bytes counts. A token of continuation
    bytes does not count, nor does one with E3 or F0, which begin kana and emoji as well.
    """
    pieces = enumerate(_pieces(tokenizer))
    opens = re.compile(rb"[\xe4-\xe9]")
    return [k for k, piece in pieces if opens.search(piece) or HAN.search(piece.decode("utf-8", errors="ignore"))]


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of each token, by id."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]):
        byte = {sign: value for value, sign in bytes_to_unicode().items()}
        return [bytes(byte[sign] for sign in name) if set(name) <= byte.keys() else name.encode() for name in names]
    rare = [re.fullmatch(r"<0x([0-9A-F]{2})>", name) for name in names]  # SentencePiece's tokens for single bytes
    return [bytes([int(match[1], 16)]) if match else name.encode() for name, match in zip(names, rare, strict=True)]


def han_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    adapters: Sequence[str] | None = None,
) -> list[float]:
    """The probability, from 0 to 1, that the next token after each prompt writes Han; see `han_pieces`.

    Parameters
    ----------
    adapters
        For each prompt its adapter, or "base"; if None, the active one.
    """
    pieces = torch.tensor(han_pieces(tokenizer), device=model.device)
    mass = [0.0] * len(prompts)
    sequences = [list(tokenizer(prompt).input_ids) for prompt in prompts]
    for k, logits in predict(model, sequences, adapters):
        mass[k] = logits[-1].softmax(-1)[pieces].sum().item()
    return mass
