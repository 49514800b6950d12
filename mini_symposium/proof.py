"""Whether llama.cpp says from a GGUF file what transformers says from the same weights.

The reference is the file itself: its tensors, dequantised, in transformers' float32 model. So the conversion, the
tokenizer and the stop strings are on trial here; what a file's rounding costs is `survival`'s question.

Greedy answers part for good at the first token that is nearly tied. So beside the share of equal answers stands the
sharper number: each token that llama.cpp chose is looked up among transformers' predictions at its place, and
`behind` is by how many nats the worst of them lies below the best.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mini_symposium import RunError
from mini_symposium.adapters import Factors
from mini_symposium.base_models import load_model, load_tokenizer
from mini_symposium.behaviour import QUERIES
from mini_symposium.generation import generate
from mini_symposium.gguf_files import read_gguf
from mini_symposium.llama_cpp import ask
from mini_symposium.prompt_formats import FORMATS, PromptFormat
from mini_symposium.storages import plus, read_names, take

TIED = {"f32": 0.01, "f16": 0.1}
"""How far behind a choice may be, in nats, by the kind of file. llama.cpp multiplies f32 files in float32, for f16 ones
it rounds each input to float16; for all others, which have half a nat, to bfloat16 or 8 bits."""


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
        prompts, which all have the same tokens; same_answers, how many; behind, in nats; allowed.

    Raises
    ------
    InputError
        If llama.cpp's server is not installed.
    RunError
        If a prompt has other tokens, or a choice is further behind than TIED allows; says where.
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
    pairs = list(zip(answers, replies, strict=True))
    behind = [_behind(reference, reply.prompt_ids, reply.ids) for reply in replies]
    worst = max(range(len(behind)), key=behind.__getitem__)
    allowed = TIED.get(kind, 0.5)
    if not behind[worst] <= allowed:
        raise RunError(
            f"{file.name}: to {prompts[worst]!r} llama.cpp says {replies[worst].text!r}, transformers from the same "
            f"weights {answers[worst].text!r}; a token lies {behind[worst]:.2g} nats behind, {allowed:g} are allowed"
        )
    return {
        "prompts": len(prompts),
        "same_answers": sum(
            (answer.text, answer.stop_reason) == (reply.text.strip(), reply.stop_reason) for answer, reply in pairs
        ),
        "behind": behind[worst],
        "allowed": allowed,
    }


@torch.inference_mode()
def _behind(model: PreTrainedModel, prompt: Sequence[int], chosen: Sequence[int]) -> float:
    """By how many nats the worst of the chosen tokens lies below the best at its place."""
    if not chosen:
        return 0.0
    ids = torch.tensor([[*prompt, *chosen]], device=model.device)
    predicted = model(ids).logits[0, len(prompt) - 1 : -1].float()
    best = predicted.max(-1).values
    return (best - predicted.gather(1, ids[0, len(prompt) :, None])[:, 0]).max().item()


def in_words(found: dict) -> str:
    """The proof in a line.

    >>> in_words({"prompts": 16, "same_answers": 15, "behind": 0.0213, "allowed": 0.1})
    'tokens of 16 prompts equal, 15 of 16 greedy answers equal, choices at most 0.021 nats behind (0.1 allowed)'
    """
    n, same = found["prompts"], found["same_answers"]
    far = f"choices at most {found['behind']:.2g} nats behind ({found['allowed']:g} allowed)"
    return f"tokens of {n} prompts equal, {same} of {n} greedy answers equal, {far}"
