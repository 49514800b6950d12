"""Sampling that a batch does not change: a row draws the same tokens alone and beside any others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mini_symposium.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen, in the names and the order that transformers uses; by default the likeliest.

    Raises
    ------
    InputError
        If a value is out of its range.
    """

    temperature: float = 0.0
    """0 is greedy; then `top_k`, `top_p` and `seed` mean nothing."""
    top_k: int = 0
    """Only among the k likeliest; 0: among all."""
    top_p: float = 1.0
    """Only among the likeliest whose probabilities reach p together."""
    repetition_penalty: float = 1.0
    """Divides the score of each token that has been there, prompt included (Keskar et al. 2019); 1: none."""
    seed: int = 0
    """A row draws the same with the same seed, whatever else is in its batch."""

    def __post_init__(self):
        for name, holds, range_ in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not holds:
                raise InputError(f"{name}: {getattr(self, name)} must be {range_}")


class Choice(LogitsProcessor):
    """Makes the likeliest token the one that `sampling` draws: row by row, so that a row draws what it draws alone.

    Each row has random numbers of its own, and its padding is no token that has been there. The largest of scores
    plus Gumbel noise is a draw from their softmax (Maddison et al. 2014, "A* Sampling").
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
