"""Whether a fine-tune survives the way it is stored: in the weights, and in what the model does.

At a low learning rate the whole fine-tune is smaller than one step of most file formats. Two views of what is left:

- **Weights.** The intended change is B A. The surviving one is stored(base + B A) - stored(base): what separates the
  file from the one that the base alone would have become. Compared with stored(base + B A) - base it leaves out the
  rounding of the base itself, which a file without any fine-tune has as well. That rounding is `noise`.
- **Behaviour.** Rounding noise is incoherent and the change is not, so a model may keep what its weights seem to have
  lost, or bury it: the loss on the training rows, next-token distributions and greedy answers decide.

`verdict` is the rule, fixed before anything was measured.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium import InputError
from mini_symposium.adapters import Factors, read_adapters
from mini_symposium.base_models import load_tokenizer
from mini_symposium.dataset import Row, load_examples, tokenize
from mini_symposium.generation import generate, load_with_adapters
from mini_symposium.merge import compare, logits, merge
from mini_symposium.prompt_formats import FORMATS
from mini_symposium.recipe import Recipe
from mini_symposium.storages import STORAGES, Tensors, read_model, stored

GAIN_KEPT, GAIN_LOST, KL_KEPT = 0.9, 0.5, 0.5
"""The rule. `gain` is the share that is left of the fine-tune's effect on its own rows: by how much the file's loss on
them is below that of the base stored in the same way, over the same difference without rounding. `kl` is how far the
file's predictions are from the live adapter's, as a share of how far the base's are.

- kept: at least nine tenths of the gain is left, and the file is nearer to the live adapter than half the way to the
  base.
- blurred: at least half the gain is left, but less than nine tenths, or beneath rounding noise as large as the
  fine-tune itself.
- lost: less than half the gain is left.
"""

QUERIES = (
    "Why does the moon look larger near the horizon?",
    "Write a function that counts the vowels in a text.",
    "My neighbour plays the drums at night. What should I do?",
    "A train leaves at 8:40 and arrives at 11:05. How long does it take?",
)
"""Held out: about none of the things that the training rows are about."""

IN_FORMATS = ("new-query", "character", "alpaca")

BESIDE = ("q8_0", "q4_K_M")
"""Storages of the untouched base for which an adapter beside it, as a LoRA GGUF, is measured as well."""


def survival(
    checkpoint: Path,
    recipe: Recipe,
    storages: Sequence[str] = STORAGES,
    rows: int = 0,
    max_new_tokens: int = 32,
    show: Callable[[str], object] = lambda line: None,
) -> dict:
    """Measure what is left of the fine-tune in each storage, against base + adapter as it was trained.

    The base is the dequantised NF4 one. One model is held, and the weights of four: 17 bytes a parameter or so.

    Parameters
    ----------
    rows
        How many training rows the gain is measured on; 0 for all.
    show
        Called with each storage's name as it is begun.

    Returns
    -------
    dict
        live: loss, and base_loss, base_kl, base_same for the base without the adapter. storages: a row each with
        storage, cosine, relative_norm, noise (all over the adapted matrices), loss, gain, kl (nats a token), kl_share,
        same (share of greedy answers unchanged), verdict, types. layers: storage, layer, cosine, relative_norm.

    Raises
    ------
    InputError
        If the adapter is damaged, or adds nothing to the base.
    """
    factors, _ = read_adapters({checkpoint: 1.0})
    if not any(b.any() for _, b in factors.values()):
        raise InputError(f"{checkpoint}: its lora_B is zero, so it changes nothing that could survive")
    tokenizer = load_tokenizer(recipe.base_model)
    examples = load_examples(recipe.dataset)[: rows or None]
    trained = tokenize(examples, tokenizer, recipe.sequence_len, not recipe.train_on_inputs)
    show("live adapter")
    model = load_with_adapters(recipe.base_model, {"adapter": checkpoint}, True, torch.float32)
    behaviour = Behaviour(model, tokenizer, trained, max_new_tokens)
    live = {"loss": behaviour.live_loss}
    with model.disable_adapter():
        live |= {f"base_{key}": value for key, value in behaviour.measure().items()}
    behaviour.model = model.unload()
    with tempfile.TemporaryDirectory(prefix="survival-") as folder:
        tuned, base = Path(folder) / "tuned", Path(folder) / "base"
        merge(checkpoint, recipe.base_model, tuned, "nf4")
        merge({checkpoint: 0.0}, recipe.base_model, base, "nf4")
        found, layers, plain = [], [], read_model(base)

        def add(storage: str, tensors: Tensors, without: Tensors, types: dict) -> None:
            exact = all(torch.equal(without[name], plain[name]) for name in plain)
            base_loss = live["base_loss"] if exact else behaviour.loss_of(without)
            measured = behaviour.measure(tensors)
            measured["gain"] = (base_loss - measured["loss"]) / (live["base_loss"] - live["loss"])
            measured["kl_share"] = measured["kl"] / live["base_kl"]
            weights, by_layer = _weights(factors, tensors, without, plain)
            row = {"storage": storage, **weights, **measured}
            found.append({**row, "verdict": verdict(row["gain"], row["kl_share"]), "types": types})
            layers.extend({"storage": storage, **each} for each in by_layer)

        for storage, (tensors, without), types in stored([tuned, base], set(factors), storages, Path(folder)):
            show(storage)
            add(storage, tensors, without, types)
            if storage in BESIDE:
                name = f"{storage} + LoRA"
                show(name)
                beside = {k: t.addmm(*factors[k][::-1]) if k in factors else t for k, t in without.items()}
                add(name, beside, without, types)
    return {"live": live, "storages": found, "layers": layers}


class Behaviour:
    """What a model does: its loss on the training rows, and predictions and answers on held-out prompts.

    The predictions are compared over prompts with the live adapter's own answers to them.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_new_tokens: int
    ):
        self.model, self.tokenizer, self.rows, self.max_new_tokens = model, tokenizer, rows, max_new_tokens
        formats = [FORMATS[name] for name in IN_FORMATS]
        self.prompts = [form.render(query) for query in QUERIES for form in formats]
        self.stops = [form.stop_strings() for _ in QUERIES for form in formats]
        self.live_answers = self._answers()
        self.texts = [prompt + answer for prompt, answer in zip(self.prompts, self.live_answers, strict=True)]
        self.live_logits = logits(model, tokenizer, self.texts)
        self.live_loss = self._loss()

    def measure(self, tensors: Tensors | None = None) -> dict[str, float]:
        """loss, kl from the live adapter, and the share of its answers that come out the same."""
        if tensors:
            self._take(tensors)
        same = [a == b for a, b in zip(self._answers(), self.live_answers, strict=True)]
        kl = compare(self.live_logits, logits(self.model, self.tokenizer, self.texts))["kl"]
        return {"loss": self._loss(), "kl": kl, "same": sum(same) / len(same)}

    def loss_of(self, tensors: Tensors) -> float:
        """Loss on the training rows with these weights."""
        self._take(tensors)
        return self._loss()

    @torch.no_grad()
    def _take(self, tensors: Tensors) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[name])

    def _answers(self) -> list[str]:
        return [
            answer.text
            for answer in generate(self.model, self.tokenizer, self.prompts, self.stops, self.max_new_tokens)
        ]

    @torch.inference_mode()
    def _loss(self) -> float:
        """Mean over the supervised tokens of all rows, in nats."""
        total, tokens = 0.0, 0
        for row in self.rows:
            ids = torch.tensor([row.input_ids], device=self.model.device)
            kept = torch.tensor(row.completion_mask[1:], dtype=torch.bool, device=ids.device)
            predicted = self.model(ids).logits[0, :-1][kept].float()
            total += torch.nn.functional.cross_entropy(predicted, ids[0, 1:][kept], reduction="sum").item()
            tokens += int(kept.sum())
        return total / tokens


def _weights(
    factors: Factors, tensors: Tensors, without: Tensors, plain: Tensors
) -> tuple[dict[str, float], list[dict]]:
    """cosine and relative norm of the surviving change, and the file's rounding noise over the intended change's norm;
    over all adapted matrices, and matrix by matrix."""
    rows, sums = [], torch.zeros(4, dtype=torch.float64)
    for name, (a, b) in factors.items():
        intended = b @ a
        survived = tensors[name] - without[name]
        noise = tensors[name] - plain[name] - intended
        part = torch.stack(
            [
                (x * y).sum(dtype=torch.float64)
                for x, y in ((intended, intended), (survived, survived), (intended, survived), (noise, noise))
            ]
        )
        sums += part
        rows.append({"layer": name.removeprefix("model.").removesuffix(".weight"), **_shares(part)})
    return _shares(sums), rows


def _shares(sums: torch.Tensor) -> dict[str, float]:
    intended, survived, both, noise = sums.tolist()
    lengths = (intended * survived) ** 0.5
    return {
        "cosine": both / lengths if lengths else 0.0,
        "relative_norm": (survived / intended) ** 0.5 if intended else 0.0,
        "noise": (noise / intended) ** 0.5 if intended else 0.0,
    }


def verdict(gain: float, kl_share: float) -> str:
    """kept, blurred or lost; see the rule beside GAIN_KEPT.

    >>> [verdict(*case) for case in ((0.98, 0.01), (0.98, 0.8), (0.6, 0.1), (0.2, 0.9))]
    ['kept', 'blurred', 'blurred', 'lost']
    """
    if gain < GAIN_LOST:
        return "lost"
    return "kept" if gain >= GAIN_KEPT and kl_share <= KL_KEPT else "blurred"


def sentence(storages: Sequence[Mapping]) -> str:
    """Which files still contain the fine-tune.

    >>> sentence([{"storage": "fp32", "verdict": "kept"}, {"storage": "NF4", "verdict": "lost"}])
    'The fine-tune is still in fp32; it is lost in NF4.'
    """
    by_verdict = {}
    for row in storages:
        by_verdict.setdefault(row["verdict"], []).append(row["storage"])
    said = {
        "kept": "it is still in {}",
        "blurred": "in {} it is there but blurred by the rounding",
        "lost": "it is lost in {}",
    }
    parts = [text.format(_listed(by_verdict[key])) for key, text in said.items() if key in by_verdict]
    return "; ".join(parts).replace("it", "The fine-tune", 1) + "."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
