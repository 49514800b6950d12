"""What a model does, as numbers that can be compared: on the rows that it was trained on, and on prompts held out."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium.data.dataset import Row
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.models.generation import generate
from mini_symposium.models.merge import logits

QUERIES = (
    "Why does the moon look larger near the horizon?",
    "Write a function that counts the vowels in a text.",
    "My neighbour plays the drums at night. What should I do?",
    "A train leaves at 8:40 and arrives at 11:05. How long does it take?",
)
"""Held out: about none of the things that the training rows are about."""

IN_FORMATS = ("new-query", "character", "alpaca")


class Behaviour:
    """A model's greedy answers to held-out prompts, and by how much others that take its place differ from it.

    The answers are generated once. Whether another model would have given the same is read from its predictions along
    them: it does if it prefers the same token at every place, the one after the last included.

    Attributes
    ----------
    model : PreTrainedModel
        What `measure` measures; the one that this was made with is the reference.
    answers : list of str
        The reference's.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_new_tokens: int
    ):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        formats = [FORMATS[name] for name in IN_FORMATS]
        prompts = [form.render(query) for query in QUERIES for form in formats]
        stops = [form.stop_strings() for _ in QUERIES for form in formats]
        answers = generate(model, tokenizer, prompts, stops, max_new_tokens)
        self.answers, asked = [answer.text for answer in answers], tokenizer(prompts)["input_ids"]
        self.starts = [len(ids) - 1 for ids in asked]
        self.said = [[*ids, *answer.ids] for ids, answer in zip(asked, answers, strict=True)]
        # In float64: what a file in float32 loses is far below what float32 can tell of a KL.
        self.reference = [each.double().log_softmax(-1) for each in logits(model, tokenizer, self.said)]

    def measure(self) -> dict[str, float]:
        """What the model does now.

        Returns
        -------
        dict
            loss on the training rows, in nats a token, and match, the share of their tokens that it would have chosen
            (both over supervised tokens); kl from the reference, in nats a token, over prompts and answers; same, the
            share of the reference's answers that it gives too.
        """
        found = logits(self.model, self.tokenizer, self.said)
        kept, kl = 0, 0.0
        for ours, theirs, start in zip(found, self.reference, self.starts, strict=True):
            kept += torch.equal(ours[start:].argmax(-1), theirs[start:].argmax(-1))
            log_p = ours.double().log_softmax(-1)
            kl += torch.nn.functional.kl_div(log_p, theirs, reduction="sum", log_target=True).item()
        loss, match = self.on_rows()
        return {"loss": loss, "match": match, "kl": kl / sum(map(len, found)), "same": kept / len(found)}

    @torch.inference_mode()
    def on_rows(self) -> tuple[float, float]:
        """Mean loss over the supervised tokens of all rows, and the share of them that are the first choice."""
        loss, match, tokens = 0.0, 0, 0
        for row in self.rows:
            ids = torch.tensor([row.input_ids], device=self.model.device)
            kept = torch.tensor(row.completion_mask[1:], dtype=torch.bool, device=ids.device)
            places = kept.nonzero()[:, 0]  # only there is the language-model head asked
            predicted, labels = self.model(ids, logits_to_keep=places).logits[0].float(), ids[0, 1:][kept]
            loss += torch.nn.functional.cross_entropy(predicted, labels, reduction="sum").item()
            match += (predicted.argmax(-1) == labels).sum().item()
            tokens += len(labels)
        return loss / tokens, match / tokens
