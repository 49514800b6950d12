"""Whether a fine-tune survives the way it is stored: in the weights, and in what the model does.

At a low learning rate the whole fine-tune is smaller than one step of most file formats. Two views of what is left:

- **Weights.** The intended change is B A. The surviving one is stored(base + B A) - stored(base): what separates the
  file from the one that the base alone would have become. Compared with stored(base + B A) - base it leaves out the
  rounding of the base itself, which a file without any fine-tune has as well. That rounding is `noise`.
- **Behaviour.** Rounding noise is incoherent and the change is not, so a model may keep what its weights seem to have
  lost, or bury it: the loss on the training rows, next-token distributions and greedy answers decide.

`verdict` is the rule, fixed before anything was measured.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium.data.dataset import Row, load_examples, tokenize
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import InputError
from mini_symposium.models.adapters import Factors, load_with_adapters, read_adapters
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.models.generation import generate
from mini_symposium.models.merge import merge
from mini_symposium.models.predictions import logits, predict
from mini_symposium.models.safetensors_files import plus, read_header, read_model, take, write_tensors
from mini_symposium.recipe import Recipe
from mini_symposium.release.gguf import QUERIES
from mini_symposium.release.storage_formats import STORAGES, possible, stored

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

    def on_rows(self) -> tuple[float, float]:
        """Mean loss over the supervised tokens of all rows, and the share of them that are the first choice."""
        loss, match, tokens = 0.0, 0, 0
        sequences = [row.input_ids for row in self.rows]
        places = [[at for at, kept in enumerate(row.completion_mask[1:]) if kept] for row in self.rows]
        for k, predicted in predict(self.model, sequences, places=places):
            labels = torch.tensor([sequences[k][at + 1] for at in places[k]], device=predicted.device)
            loss += torch.nn.functional.cross_entropy(predicted, labels, reduction="sum").item()
            match += (predicted.argmax(-1) == labels).sum().item()
            tokens += len(labels)
        return loss / tokens, match / tokens


GAIN_KEPT, GAIN_LOST, KL_KEPT = 0.9, 0.5, 0.5
"""The rule. `gain` is the share that is left of the fine-tune's effect on its own rows: by how much the file's loss on
them is below that of the base stored in the same way, over the same difference without rounding. `kl_share` is how far
the file's predictions are from the live adapter's, over how far the base's are.

- kept: at least nine tenths of the gain is left, and the file is nearer to the live adapter than half the way to the
  base.
- lost: less than half the gain is left.
- blurred: what lies between; or the gain is there, beneath rounding noise as large as half the fine-tune.
"""

MEASURABLE = 1e-4
"""Nats a token. Where the fine-tune lowers the loss on its own rows by less, that is no yardstick, and the predictions
decide alone: kept up to KL_KEPT, lost from 1 on."""

BESIDE = ("q8_0", "q4_K_M")
"""Storages of the untouched base for which an adapter beside it, as a LoRA GGUF, is measured as well."""


def survival(
    checkpoint: Path,
    recipe: Recipe,
    storages: Sequence[str] = STORAGES,
    rows: int = 6,
    max_new_tokens: int = 32,
    show: Callable[[str], object] = lambda line: None,
) -> dict:
    """Measure what is left of the fine-tune in each storage, against base + adapter as it was trained.

    The base is the dequantised NF4 one. One model is held, in float32, and what it is compared with where memory has
    room (see `storages.stored`); that lies in a temporary folder, 8 bytes a parameter and as much again for GGUF files.

    Parameters
    ----------
    storages
        Some of STORAGES; those that need llama.cpp's quantiser are left out where it is not installed.
    rows
        On how many training rows, the first, loss and match are measured; 0 for all.
    show
        Called with each storage's name as it is begun, and with what is left out.

    Returns
    -------
    dict
        live: of the live adapter loss and match, and base_loss, base_match, base_kl, base_same of the base without it.
        storages: a row each with storage, verdict, loss, match, kl (nats a token), same (see `Behaviour`), gain (None
        if not MEASURABLE), kl_share, cosine, relative_norm, noise (all adapted matrices together; see `_shares`),
        types. layers: storage, layer, cosine, relative_norm, noise. sentence.

    Raises
    ------
    InputError
        If the adapter is damaged, adds nothing to the base, or there is no such storage.
    """
    wanted, left_out = possible(storages)
    factors, _ = read_adapters({checkpoint: 1.0})
    if not any(b.any() for _, b in factors.values()):
        raise InputError(f"{checkpoint}: its lora_B is zero, so it changes nothing that could survive")
    tokenizer = load_tokenizer(recipe.base_model)
    examples = load_examples(recipe.dataset)[: rows or None]
    trained = tokenize(examples, tokenizer, recipe.sequence_len, not recipe.train_on_inputs)
    if left_out:
        show(left_out)
    show("live adapter")
    model = load_with_adapters(recipe.base_model, {"adapter": checkpoint}, True, torch.float32)
    behaviour = Behaviour(model, tokenizer, trained, max_new_tokens)
    live = dict(zip(("loss", "match"), behaviour.on_rows(), strict=True))
    with model.disable_adapter():
        live |= {f"base_{key}": value for key, value in behaviour.measure().items()}
    if not live["base_kl"]:
        raise InputError(f"{checkpoint}: base + adapter predicts exactly as the base; there is nothing to survive")
    behaviour.model = model.unload()
    found, layers = [], []
    with tempfile.TemporaryDirectory(prefix="survival-") as folder:
        tuned, base = Path(folder) / "tuned", Path(folder) / "base"
        merge({checkpoint: 0.0}, recipe.base_model, base, "nf4")
        _write_tuned(base, factors, tuned)
        plain = read_model(base)
        for storage, (tensors, without), types in stored([tuned, base], set(factors), wanted, Path(folder)):
            ways = {storage: tensors}
            if storage in BESIDE:
                ways[f"{storage} + LoRA"] = plus(without, factors)
            base_loss = live["base_loss"]
            if any(not torch.equal(without[name], plain[name]) for name in plain):
                take(behaviour.model, without)
                base_loss, _ = behaviour.on_rows()
            for name, weights in ways.items():
                show(name)
                take(behaviour.model, weights)
                left = _left(behaviour.measure(), base_loss, live)
                in_all, by_layer = _weights(factors, weights, without, plain)
                found.append({"storage": name, **left, **in_all, "types": types})
                layers.extend({"storage": name, **each} for each in by_layer)
    return {"live": live, "storages": found, "layers": layers, "sentence": sentence(found)}


def _write_tuned(base: Path, factors: Factors, out: Path) -> None:
    """The model directory `base` with what the adapter adds; `merge` would quantise the base once more."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = plus(read_model(base), factors)
    for path in base.glob("*.safetensors"):
        header = read_header(path)
        write_tensors(out / path.name, header, (tensors[name] for name in header))


def _left(measured: Mapping[str, float], base_loss: float, live: Mapping[str, float]) -> dict:
    effect = live["base_loss"] - live["loss"]
    gain = (base_loss - measured["loss"]) / effect if effect >= MEASURABLE else None
    kl_share = measured["kl"] / live["base_kl"]
    return {"verdict": verdict(gain, kl_share), **measured, "gain": gain, "kl_share": kl_share}


def _weights(
    factors: Factors,
    tensors: Mapping[str, torch.Tensor],
    without: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
) -> tuple[dict[str, float], list[dict]]:
    """See `_shares`; over all adapted matrices together, and matrix by matrix."""
    rows, sums = [], torch.zeros(4, dtype=torch.float64)
    for name, (a, b) in factors.items():
        intended = b @ a
        file = tensors[name]
        survived = file - without[name]
        noise = file - plain[name] - intended
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
    """cosine of the surviving change with the intended one, its relative_norm, and the noise over the same norm: how
    far the file lies from base + B A."""
    intended, survived, both, noise = sums.tolist()
    lengths = (intended * survived) ** 0.5
    return {
        "cosine": both / lengths if lengths else 0.0,
        "relative_norm": (survived / intended) ** 0.5 if intended else 0.0,
        "noise": (noise / intended) ** 0.5 if intended else 0.0,
    }


def verdict(gain: float | None, kl_share: float) -> str:
    """kept, blurred or lost; see the rule beside GAIN_KEPT.

    >>> [verdict(*case) for case in ((0.98, 0.01), (0.98, 0.8), (0.6, 0.1), (0.2, 0.9), (None, 0.7))]
    ['kept', 'blurred', 'blurred', 'lost', 'blurred']
    """
    if gain is None:
        return "lost" if kl_share >= 1 else "kept" if kl_share <= KL_KEPT else "blurred"
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
        "kept": "{it} is still in {files}",
        "blurred": "in {files} {it} is there but blurred by the rounding",
        "lost": "{it} is lost in {files}",
    }
    parts = []
    for key, text in said.items():
        if key in by_verdict:
            parts.append(text.format(it="it" if parts else "the fine-tune", files=_listed(by_verdict[key])))
    whole = "; ".join(parts)
    return whole[:1].upper() + whole[1:] + "."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
