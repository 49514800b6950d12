"""Whether a fine-tune survives the way it is stored: in the model's weights, and in its predictions.

At a low learning rate the whole fine-tune is smaller than one rounding step of most file formats. Two measures of what
is left:

- **Weights.** The intended change is B A. The surviving change is stored(base + B A) - stored(base). Unlike
  stored(base + B A) - base, it excludes the rounding of the base itself, which a file without a fine-tune has too.
  The rounding is measured as `noise`: how far the file lies from base + B A.
- **Predictions.** Rounding noise partly cancels; the change adds up. So the predictions may keep a change that the
  weights seem to have lost, or noise may drown a change that the weights keep. Therefore the predictions decide: loss
  on the training rows, and next-token distributions over prompts and greedy answers.

`verdict` is the rule; it was fixed before anything was measured.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_symposium.data.dataset import Row, recipe_examples, tokenize
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import InputError
from mini_symposium.models.adapters import Factors, load_with_adapters, read_adapters
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.models.generation import generate
from mini_symposium.models.merge import merge
from mini_symposium.models.predictions import compare, logits, predict
from mini_symposium.models.safetensors_files import plus, read_header, read_model, take, write_tensors
from mini_symposium.recipe import Recipe
from mini_symposium.release.gguf import QUERIES
from mini_symposium.release.storage_formats import STORAGES, available, stored

IN_FORMATS = ("new-query", "character", "alpaca")


class Reference:
    """A reference model's greedy answers to held-out prompts and its predictions along them, to compare models with.

    Only the reference generates. Another model would give the same answer if it prefers the same token at every
    position of the answer, including the one after the last token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int):
        formats = [FORMATS[name] for name in IN_FORMATS]
        prompts = [form.render(query) for query in QUERIES for form in formats]
        stops = [form.stop_strings() for _ in QUERIES for form in formats]
        answers = generate(model, tokenizer, prompts, stops, max_new_tokens)
        prompt_ids = tokenizer(prompts)["input_ids"]
        self.tokenizer = tokenizer
        self.sequences = [[*ids, *answer.ids] for ids, answer in zip(prompt_ids, answers, strict=True)]
        self.starts = [len(ids) - 1 for ids in prompt_ids]
        self.logits = logits(model, tokenizer, self.sequences)

    def compare(self, model: PreTrainedModel) -> dict[str, float]:
        """kl: divergence of the model's predictions from the reference's, in nats a token over prompts and answers.
        same: share of the reference's answers that the model gives too."""
        predicted = logits(model, self.tokenizer, self.sequences)
        pairs = zip(predicted, self.logits, self.starts, strict=True)
        same = sum(torch.equal(ours[start:].argmax(-1), theirs[start:].argmax(-1)) for ours, theirs, start in pairs)
        return {"kl": compare(self.logits, predicted)["kl"], "same": same / len(predicted)}


def loss_and_match(model: PreTrainedModel, rows: Sequence[Row]) -> dict[str, float]:
    """loss: nats a token, over the supervised tokens of all rows. match: share of them that the model ranks first."""
    loss, match, tokens = 0.0, 0, 0
    sequences = [row.input_ids for row in rows]
    places = [[at for at, kept in enumerate(row.completion_mask[1:]) if kept] for row in rows]
    for k, predicted in predict(model, sequences, places=places):
        labels = torch.tensor([sequences[k][at + 1] for at in places[k]], device=predicted.device)
        loss += torch.nn.functional.cross_entropy(predicted, labels, reduction="sum").item()
        match += (predicted.argmax(-1) == labels).sum().item()
        tokens += len(labels)
    return {"loss": loss / tokens, "match": match / tokens}


GAIN_KEPT, GAIN_LOST, KL_KEPT = 0.9, 0.5, 0.5
"""The rule of `verdict`. `gain` is the share that is left of the fine-tune's effect on the training rows: (loss of the
base, stored in the same way - loss of the file) / (loss of the base - loss with the live adapter). `kl_share` is the KL
of the file's predictions from the live adapter's, divided by the KL of the base's.

- kept: at least nine tenths of the gain are left, and the KL is at most half the base's.
- lost: less than half the gain is left.
- blurred: everything else: half to nine tenths of the gain are left, or more, but with a KL above half the base's.
"""

MEASURABLE = 1e-4
"""Nats a token. If the fine-tune lowers the loss on the training rows by less, gain is None, and kl_share alone
decides: kept up to KL_KEPT, lost from 1 on."""

BESIDE = ("q8_0", "q4_K_M")
"""Storages in which the base is also measured with the adapter beside it, unmerged, as a LoRA GGUF."""


def survival(
    checkpoint: Path,
    recipe: Recipe,
    storages: Sequence[str] = STORAGES,
    rows: int = 6,
    max_new_tokens: int = 32,
    show: Callable[[str], object] = lambda line: None,
) -> dict:
    """Measure what is left of the fine-tune in each storage, compared with base + adapter as it was trained.

    The base is the dequantised NF4 one. Memory holds one model in float32, and the tensors of the storages if they fit
    (see `storage_formats.stored`). A temporary folder takes 8 bytes a parameter, and as much again for GGUF files.

    Parameters
    ----------
    storages
        Some of STORAGES; those that need llama.cpp's quantiser are left out if it is not installed.
    rows
        Number of training rows, from the first, on which loss and match are measured; 0 for all.
    show
        Called with the name of each storage when its measurement begins, and with a note on storages left out.

    Returns
    -------
    dict
        live: loss and match with the live adapter, and base_loss, base_match, base_kl, base_same of the base alone.
        storages: a row each with storage, verdict, loss, match (see `loss_and_match`), kl, same (see `Reference`),
        gain (None if not MEASURABLE), kl_share, cosine, relative_norm, noise (see `_shares`; all adapted matrices
        together), types. layers: storage, layer, cosine, relative_norm, noise. sentence.

    Raises
    ------
    InputError
        If the adapter is damaged, adds nothing to the base, or there is no such storage.
    """
    wanted, left_out = available(storages)
    factors, _ = read_adapters({checkpoint: 1.0})
    if not any(b.any() for _, b in factors.values()):
        raise InputError(f"{checkpoint}: its lora_B is zero, so it changes nothing that could be measured")
    tokenizer = load_tokenizer(recipe.base_model)
    examples = recipe_examples(recipe)[0][: rows or None]
    trained = tokenize(examples, tokenizer, recipe.sequence_len, not recipe.train_on_inputs)
    if left_out:
        show(left_out)
    show("live adapter")
    model = load_with_adapters(recipe.base_model, {"adapter": checkpoint}, True, torch.float32)
    reference = Reference(model, tokenizer, max_new_tokens)

    def measure() -> dict[str, float]:
        return {**loss_and_match(model, trained), **reference.compare(model)}

    live = loss_and_match(model, trained)
    with model.disable_adapter():
        live |= {f"base_{key}": value for key, value in measure().items()}
    if not live["base_kl"]:
        raise InputError(f"{checkpoint}: base + adapter predicts exactly as the base, so nothing can be measured")
    model = model.unload()
    measured, layers = [], []
    with tempfile.TemporaryDirectory(prefix="survival-") as folder:
        tuned, base = Path(folder) / "tuned", Path(folder) / "base"
        merge({checkpoint: 0.0}, recipe.base_model, base, "nf4")
        _write_tuned(base, factors, tuned)
        plain = read_model(base)
        for storage, (tensors, without), types in stored([tuned, base], set(factors), wanted, Path(folder)):
            variants = {storage: tensors}
            if storage in BESIDE:
                variants[f"{storage} + LoRA"] = plus(without, factors)
            base_loss = live["base_loss"]
            if any(not torch.equal(without[name], plain[name]) for name in plain):
                take(model, without)
                base_loss = loss_and_match(model, trained)["loss"]
            for name, weights in variants.items():
                show(name)
                take(model, weights)
                left = _left(measure(), base_loss, live)
                together, by_layer = _compare_weights(factors, weights, without, plain)
                measured.append({"storage": name, **left, **together, "types": types})
                layers.extend({"storage": name, **layer} for layer in by_layer)
    return {"live": live, "storages": measured, "layers": layers, "sentence": sentence(measured)}


def _write_tuned(base: Path, factors: Factors, out: Path) -> None:
    """Write the model directory `base` plus the adapter to `out`; `merge` would quantise the base a second time."""
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


def _compare_weights(
    factors: Factors,
    tensors: Mapping[str, torch.Tensor],
    without: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
) -> tuple[dict[str, float], list[dict]]:
    """`_shares` of all adapted matrices together, and of each, from stored(base + B A), stored(base) and the base."""
    layers, total = [], torch.zeros(4, dtype=torch.float64)
    for name, (a, b) in factors.items():
        intended = b @ a
        survived = tensors[name] - without[name]
        noise = tensors[name] - plain[name] - intended
        pairs = ((intended, intended), (survived, survived), (intended, survived), (noise, noise))
        products = torch.stack([(x * y).sum(dtype=torch.float64) for x, y in pairs])
        total += products
        layers.append({"layer": name.removeprefix("model.").removesuffix(".weight"), **_shares(products)})
    return _shares(total), layers


def _shares(products: torch.Tensor) -> dict[str, float]:
    """cosine of the surviving change with the intended one; relative_norm: its norm, divided by the intended change's;
    noise: the norm of stored(base + B A) - (base + B A), divided by the same."""
    intended, survived, both, noise = products.tolist()
    norms = (intended * survived) ** 0.5
    return {
        "cosine": both / norms if norms else 0.0,
        "relative_norm": (survived / intended) ** 0.5 if intended else 0.0,
        "noise": (noise / intended) ** 0.5 if intended else 0.0,
    }


def verdict(gain: float | None, kl_share: float) -> str:
    """kept, blurred or lost, by the rule at GAIN_KEPT.

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
    phrases = {
        "kept": "{it} is still in {files}",
        "blurred": "in {files} {it} is there but blurred by the rounding",
        "lost": "{it} is lost in {files}",
    }
    parts = []
    for key, phrase in phrases.items():
        if key in by_verdict:
            *others, last = by_verdict[key]
            files = f"{', '.join(others)} and {last}" if others else last
            parts.append(phrase.format(it="it" if parts else "the fine-tune", files=files))
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."
