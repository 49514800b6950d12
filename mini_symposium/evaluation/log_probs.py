"""What a model would have said: the probabilities behind its answers, by forward passes without generation.

Everything here is one batched computation, `_predictions`: rows of any length and any adapters side by side. It is read
as the loss, EM and ES of training rows (`teacher_forced`), as the probability of an answer (`answer_log_probs`), as how
much that depends on the prompt's format (`posix`), and as the probability that Chinese comes next (`han_mass`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mini_symposium.data.dataset import Row
from mini_symposium.data.prompt_formats import PromptFormat
from mini_symposium.data.text_overlap import HAN
from mini_symposium.errors import InputError
from mini_symposium.evaluation.memorization import known, unsaid
from mini_symposium.models.generation import Answer, generate
from mini_symposium.models.predictions import predict


@dataclass(frozen=True)
class LogProb:
    """Summed log P(answer | prompt) in nats, over so many tokens."""

    log_p: float
    tokens: int


def teacher_forced(
    model: PreTrainedModel, rows: Sequence[Row], adapters: Sequence[str] = ("base",), free: int | None = None
) -> list[dict]:
    """How well every named adapter ("base" for none) predicts each row, given the row's own tokens.

    Parameters
    ----------
    free
        Memory to plan with, in bytes; by default what is free now.

    Returns
    -------
    list of dict
        By adapter, then row: model, example (the row's position), loss (nats a token), em, es (see
        `memorization.known`) and tokens, over the supervised tokens; of the whole row what `memorization.unsaid` says.

    Raises
    ------
    InputError
        If a row exceeds the model's context, or has no supervised token.
    """
    for row in rows:
        if not any(row.completion_mask[1:]):
            raise InputError(f"{row.source}: no supervised token, so there is nothing to predict")
    found: list[dict] = [{}] * (len(rows) * len(adapters))
    names = [name for name in adapters for _ in rows]
    for k, logits in predict(model, [row.input_ids for row in rows] * len(adapters), names, free):
        row = rows[k % len(rows)]
        kept = torch.tensor(row.completion_mask[1:], dtype=torch.bool)
        labels = torch.tensor(row.input_ids[1:])
        matches, bos = logits[:-1].argmax(-1).cpu() == labels, int(row.input_ids[0] == model.config.bos_token_id)
        found[k] = {
            "model": names[k],
            "example": k % len(rows),
            "loss": torch.nn.functional.cross_entropy(logits[:-1].cpu()[kept], labels[kept]).item(),
            **known(matches[kept].tolist()),
            "tokens": int(kept.sum()),
            **unsaid(matches.tolist(), bos),
        }
    return found


def answer_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str | Sequence[int]],
    adapters: Sequence[str] | None = None,
    free: int | None = None,
) -> list[LogProb]:
    """log P(answer | prompt) of each pair, without the EOS after it.

    Parameters
    ----------
    answers
        Token ids, as in `generation.Answer.ids`, or texts, which are split as they would be in the same row.
    adapters
        For each prompt the adapter, "base" for none; None for the active one.

    Raises
    ------
    InputError
        If a pair exceeds the model's context.
    """
    pairs = [_pair(tokenizer, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    found = [LogProb(0.0, 0)] * len(pairs)
    for k, logits in predict(model, [prompt + answer for prompt, answer in pairs], adapters, free):
        prompt, answer = pairs[k]
        if answer:
            predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
            wanted = torch.tensor(answer, device=logits.device)
            found[k] = LogProb(predicted.gather(1, wanted[:, None]).double().sum().item(), len(answer))
    return found


def _pair(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str | Sequence[int]) -> tuple[list[int], list[int]]:
    before = list(tokenizer(prompt).input_ids)
    if not isinstance(answer, str):
        return before, list(answer)
    together = list(tokenizer(prompt + answer).input_ids)
    if together[: len(before)] == before:
        return before, together[len(before) :]
    return before, list(tokenizer(answer, add_special_tokens=False).input_ids)  # the two melt into one token


def posix_index(log_p: Sequence[Sequence[float]], tokens: Sequence[int]) -> float | None:
    """POSIX of one query (Chatterjee et al. 2024): the mean over ordered pairs of prompts i, j of
    |log(P(y_j | x_i) / P(y_j | x_j))| / length of y_j, in nats a token. 0 if the prompt makes no difference.

    Parameters
    ----------
    log_p
        (N, N): log P(y_j | x_i) in row i, column j; y_j is the answer to prompt x_j.
    tokens
        (N,): the answers' lengths. An empty answer has no probability to compare and is left out.

    Returns
    -------
    float or None
        None if no answer, or but one prompt, is left.

    >>> posix_index([[-2.0, -9.0], [-4.0, -3.0]], [2, 3])
    1.5
    """
    table, length = np.asarray(log_p, dtype=float), np.asarray(tokens, dtype=float)
    told, n = length > 0, len(length)
    if n < 2 or not told.any():
        return None
    ratios = np.abs(table - table.diagonal())[:, told] / length[told]
    return float(ratios.sum() / (told.sum() * (n - 1)))


def posix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    formats: Sequence[PromptFormat],
    queries: Sequence[str],
    name: str = "base",
    max_new_tokens: int = 32,
    user: str = "User",
    char: str = "Assistant",
    free: int | None = None,
) -> list[float | None]:
    """POSIX over `formats` for each query, answered greedily by the adapter `name`: see `posix_index`.

    An answer counts up to its stop string, which another format has no reason to expect. The same answer to several
    formats is scored once under each. Of N formats and Q queries it is Q x N x N rows at most, so keep both small.
    """
    prompts = [form.render(query, user, char) for query in queries for form in formats]
    stops = [form.stop_strings(user, char) for form in formats] * len(queries)
    answers = generate(model, tokenizer, prompts, stops, max_new_tokens, [name] * len(prompts), free=free)
    ids, n = [_spoken(tokenizer, answer) for answer in answers], len(formats)
    groups = [range(start, start + n) for start in range(0, len(prompts), n)]
    pairs = list(dict.fromkeys((prompts[i], ids[j]) for group in groups for i in group for j in group if ids[j]))
    xs, ys = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    scored = answer_log_probs(model, tokenizer, xs, ys, [name] * len(pairs), free)
    log_p = {pair: each.log_p for pair, each in zip(pairs, scored, strict=True)}
    return [
        posix_index(
            [[log_p.get((prompts[i], ids[j]), 0.0) for j in group] for i in group], [len(ids[j]) for j in group]
        )
        for group in groups
    ]


def _spoken(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> tuple[int, ...]:
    """The tokens of an answer's text, without those of its stop string."""
    ids = list(answer.ids)
    while ids and tokenizer.decode(ids[:-1], skip_special_tokens=True).strip().startswith(answer.text):
        ids.pop()
    return tuple(ids)


def han_pieces(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the vocabulary's pieces that write Han, whole characters or the beginning of one.

    Byte-level BPE cuts characters into bytes. In UTF-8 the bytes E4 to E9 only ever open a character, one of U+4000 to
    U+9FFF, and but for 64 hexagrams those are Han; so a piece with such a byte counts. Pieces of continuation bytes
    alone do not, nor does E3 or F0, which open kana and emoji as well.
    """
    pieces = enumerate(_pieces(tokenizer))
    opens = re.compile(rb"[\xe4-\xe9]")
    return [k for k, piece in pieces if opens.search(piece) or HAN.search(piece.decode("utf-8", errors="ignore"))]


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Each piece's bytes, by id."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]):
        byte = {sign: value for value, sign in bytes_to_unicode().items()}
        return [bytes(byte[sign] for sign in name) if set(name) <= byte.keys() else name.encode() for name in names]
    lone = [re.fullmatch(r"<0x([0-9A-F]{2})>", name) for name in names]  # SentencePiece's fallback for rare bytes
    return [bytes([int(found[1], 16)]) if found else name.encode() for name, found in zip(names, lone, strict=True)]


def han_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    adapters: Sequence[str] | None = None,
    free: int | None = None,
) -> list[float]:
    """Probability that the next token after each prompt writes Han, see `han_pieces`; from 0 to 1.

    Parameters
    ----------
    adapters
        For each prompt the adapter, "base" for none; None for the active one.
    """
    pieces = torch.tensor(han_pieces(tokenizer), device=model.device)
    found = [0.0] * len(prompts)
    sequences = [list(tokenizer(prompt).input_ids) for prompt in prompts]
    for k, logits in predict(model, sequences, adapters, free):
        found[k] = logits[-1].softmax(-1)[pieces].sum().item()
    return found
