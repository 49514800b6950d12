"""A model's predictions: its logits after each token of given sequences, and how far apart those of two models are.

All code that needs logits or probabilities without generating text calls `predict`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mini_symposium.errors import InputError
from mini_symposium.models.adapters import adapter_names
from mini_symposium.models.devices import device, memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARE = 0.25
"""The part of the free memory that the logits of a batch may fill."""

COMPARED = 12
"""Sequences in a batch of `logits`, however much memory is free. The last bits of a logit depend on the shape of its
batch, so two models that are compared must be given the same batches."""


@torch.inference_mode()
def predict(
    model: "PreTrainedModel",
    sequences: Sequence[Sequence[int]],
    adapters: Sequence[str] | None = None,
    batch_size: int = 0,
    places: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """The index of each sequence and its next-token logits, (T, vocabulary) in float32 on the model's device.

    Sequences are padded on the right, where a causal model does not look: no mask is needed, and positions are
    the same as for a sequence alone.

    Parameters
    ----------
    sequences
        Token ids of each, with BOS where the model wants one.
    adapters
        For each sequence its adapter, or "base"; if None, the active one.
    batch_size
        Sequences in a batch, taken in the given order. 0: as many as fit into memory, the longest first, so that those
        of similar length share a batch.
    places
        For each sequence the positions whose logits are wanted, (n,); the result is then (n, vocabulary). The
        language-model head is computed only there, and each sequence is a batch of its own.

    Raises
    ------
    InputError
        If a sequence exceeds the model's context.
    """
    model.eval()
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, sequences), default=0)
    if room and longest > room:
        raise InputError(f"a row of {longest} tokens exceeds the model's {room}; shorten it")
    where = device() if model.device.type == "meta" else model.device  # meta: weights that are read when they are used
    order = list(range(len(sequences)))
    if places is not None:
        batch_size = 1
    if not batch_size:
        order.sort(key=lambda k: -len(sequences[k]))
        sequence_bytes = max(1, longest) * model.config.vocab_size * (model.dtype.itemsize + 8)
        batch_size = max(1, int(SHARE * memory() / sequence_bytes))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        width = max(len(sequences[k]) for k in batch)
        ids = torch.tensor([[*sequences[k], *[0] * (width - len(sequences[k]))] for k in batch], device=where)
        options = adapter_names(model, None if adapters is None else [adapters[k] for k in batch])
        if places is not None:
            options["logits_to_keep"] = torch.tensor(places[batch[0]], dtype=torch.long, device=where)
        predicted = model(input_ids=ids, use_cache=False, **options).logits
        for k, row in zip(batch, predicted, strict=True):
            yield k, row[: len(sequences[k])].float()


def logits(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str | Sequence[int]]
) -> list[torch.Tensor]:
    """Next-token logits at every position of each text or row of tokens, (T, vocabulary) in float32 on the CPU.

    Examples
    --------
    >>> from mini_symposium.models.base_models import load_model, load_tokenizer
    >>> [found] = logits(load_model("tiny"), load_tokenizer("tiny"), ["Why?"])  # BOS and two tokens
    >>> found.shape
    torch.Size([3, 32000])
    """
    rows = [tokenizer(text)["input_ids"] if isinstance(text, str) else list(text) for text in texts]
    return [predicted.cpu() for _, predicted in predict(model, rows, batch_size=COMPARED)]


def compare(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far the predictions `other` are from `reference`, over every position of every text.

    Parameters
    ----------
    reference, other
        Logits of each text, (T, vocabulary), as `logits` gives them.

    Returns
    -------
    dict
        largest: the biggest difference of a logit; kl: the mean KL(reference || other) in nats per token;
        same_choice: the share of positions at which both prefer the same token.

    >>> same = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    >>> compare(same, same)
    {'largest': 0.0, 'kl': 0.0, 'same_choice': 1.0}
    """
    largest, kl, same, positions = 0.0, 0.0, 0, 0
    for p, q in zip(reference, other, strict=True):  # one text at a time: a vocabulary's logits are large
        largest = max(largest, (p - q).abs().max().item())
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        positions += len(p)
    return {"largest": largest, "kl": kl / positions, "same_choice": same / positions}
