"""Whether llama.cpp says from a GGUF file what transformers says from the same weights.

The reference is the file itself: its tensors, dequantised, in transformers' float32 model. So the conversion, the
tokenizer and the stop strings are on trial here; what a file's rounding costs is `survival`'s question.

Greedy answers part for good at the first token that is nearly tied. So beside the share of equal answers stands the
sharper number: each token that llama.cpp chose is looked up among transformers' predictions at its place, and
`behind` is by how many nats it lies below the best there, on average over all tokens. The worst token is told as well,
but not judged: where inputs are rounded to 8 bits and many words are possible, one among hundreds lies far off (0.88
nats in a q8_0 file of the proxy whose float32 file agrees to the last token), which says nothing of the file.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mini_symposium.behaviour import QUERIES
from mini_symposium.data.prompt_formats import FORMATS, PromptFormat
from mini_symposium.errors import RunError
from mini_symposium.gguf_files import read_gguf
from mini_symposium.llama_cpp import ask
from mini_symposium.models.adapters import Factors
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.models.generation import generate
from mini_symposium.storages import plus, read_names, take

ALLOWED = {"f32": 0.001, "f16": 0.01}
"""How far behind the choices may be, in nats a token, by the kind of file. llama.cpp multiplies f32 files in float32;
for f16 ones it rounds each input to float16; for all others, which may be a tenth of a nat behind, to bfloat16 or 8
bits."""


def prove(
    file: Path,
    model: Path,
    kind: str,
    factors: Factors | None = None,
    lora: Path | None = None,
    formats: Sequence[PromptFormat] = tuple(FORMATS.values()),
    max_new_tokens: int = 32,
) -> dict:
    """Ask llama.cpp and transformers the same queries in every format, with its stop strings, and compare.

    Parameters
    ----------
    file, kind
        The GGUF file, and how it is stored: f32, q8_0, ...
    model
        The directory that it was made from, for its configuration and tokenizer.
    factors, lora
        What an adapter adds to the file's weights, and the same as a GGUF of its own; both, or neither.

    Returns
    -------
    dict
        prompts, which all have the same tokens; same_answers, how many; behind and worst, in nats a token; allowed.

    Raises
    ------
    InputError
        If llama.cpp's server is not installed.
    RunError
        If a prompt has other tokens, or the choices are further behind than ALLOWED; says where.
    """
    prompts = [form.render(query) for query in QUERIES[:2] for form in formats]
    stops = [form.stop_strings() for _ in QUERIES[:2] for form in formats]
    replies = ask(file, prompts, stops, max_new_tokens, lora)
    tokenizer = load_tokenizer(str(model))
    for prompt, reply in zip(prompts, replies, strict=True):
        expected = tokenizer(prompt)["input_ids"]
        if reply.prompt_ids != expected:
            at = next(i for i in range(len(expected) + 1) if reply.prompt_ids[: i + 1] != expected[: i + 1])
            there, here = (tokenizer.convert_ids_to_tokens(ids[at : at + 2]) for ids in (reply.prompt_ids, expected))
            raise RunError(f"{file.name}: {prompt!r} has other tokens in llama.cpp: {there} for {here}, at {at}")
    reference = load_model(str(model), load_in_4bit=False, dtype=torch.float32).eval()
    take(reference, plus(read_gguf(file, read_names(model)), factors or {}))
    answers = generate(reference, tokenizer, prompts, stops, max_new_tokens)
    same = [
        (answer.text, answer.stop_reason) == (reply.text.strip(), reply.stop_reason)
        for answer, reply in zip(answers, replies, strict=True)
    ]
    far = [_behind(reference, reply.prompt_ids, reply.ids) for reply in replies]
    behind, allowed = torch.cat(far).mean().item(), ALLOWED.get(kind, 0.1)
    if not behind <= allowed:
        at = max(range(len(far)), key=lambda i: far[i].sum())
        raise RunError(
            f"{file.name}: to {prompts[at]!r} llama.cpp says {replies[at].text!r}, transformers from the same weights "
            f"{answers[at].text!r}; its choices are {behind:.2g} nats behind, {allowed:g} are allowed"
        )
    return {
        "prompts": len(prompts),
        "same_answers": sum(same),
        "behind": behind,
        "worst": torch.cat(far).max().item(),
        "allowed": allowed,
    }


@torch.inference_mode()
def _behind(model: PreTrainedModel, prompt: Sequence[int], chosen: Sequence[int]) -> torch.Tensor:
    """By how many nats each of the chosen tokens lies below the best at its place, (T)."""
    if not chosen:
        return torch.zeros(0)
    ids = torch.tensor([[*prompt, *chosen]], device=model.device)
    predicted = model(ids).logits[0, len(prompt) - 1 : -1].float()
    best = predicted.max(-1).values
    return (best - predicted.gather(1, ids[0, len(prompt) :, None])[:, 0]).cpu()


def in_words(found: dict) -> str:
    """The proof in a line.

    >>> in_words({"prompts": 16, "same_answers": 15, "behind": 0.00213, "worst": 0.113, "allowed": 0.1})
    'tokens of 16 prompts equal, 15 of 16 greedy answers equal, choices 0.0021 nats behind (0.1 allowed), at worst 0.11'
    """
    n, same = found["prompts"], found["same_answers"]
    far = f"choices {found['behind']:.2g} nats behind ({found['allowed']:g} allowed), at worst {found['worst']:.2g}"
    return f"tokens of {n} prompts equal, {same} of {n} greedy answers equal, {far}"
