"""A run's model, or a model directory, as the files of those who run it elsewhere: llama.cpp, Ollama, Axolotl.

Whatever is written is written whole: a folder gets its name when everything in it is there, and every GGUF file has
answered in llama.cpp as transformers does from the same weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mini_symposium.data.dataset import load_examples, write_axolotl_jsonl
from mini_symposium.data.prompt_formats import PromptFormat
from mini_symposium.errors import InputError
from mini_symposium.files.writing import write_json, written_whole
from mini_symposium.models.adapters import find_checkpoints, read_adapters
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.merge import check_room, merge
from mini_symposium.recipe import Recipe
from mini_symposium.release.chat_frontends import modelfile
from mini_symposium.release.gguf import (
    FILE_TYPES,
    QUANTISER,
    SERVER,
    in_words,
    lora_to_gguf,
    prove,
    quantise,
    require,
    tensor_types,
    to_gguf,
)
from mini_symposium.release.model_card import HUB_IDS
from mini_symposium.run import Resolved, resolve

KINDS = ("f32", "f16", "bf16", *FILE_TYPES)
"""Of GGUF files: the first three as llama.cpp's converter writes them, the others by its quantiser."""


def choose(run_or_model: str, checkpoint: Sequence[str] = (), learning_rate: float = 0.0) -> Resolved:
    """A run with the checkpoints to release, by default the last of its lowest rate; or a model directory.

    Raises
    ------
    InputError
        If it is neither, or a checkpoint is not there.
    """
    found = resolve(run_or_model, "run", *["model"] * (not checkpoint))
    if found.kind == "run":
        return replace(found, checkpoints=find_checkpoints(found.run, checkpoint, learning_rate))
    local_directory(found.base_model)  # refuses a damaged model before anything is written
    return found


def name_of(released: Resolved) -> str:
    """What its files are called: the model's folder, or run, rate and epochs."""
    if not released.checkpoints:
        return released.path.name
    first = next(iter(released.checkpoints))
    return f"{released.path.name}-{first.parents[1].name}-{'+'.join(path.name for path in released.checkpoints)}"


def gguf(
    what: Resolved,
    out: Path,
    kinds: Sequence[str] = ("f16",),
    base: str = "nf4",
    lora: bool = False,
    check: bool = True,
    show: Callable[[str], object] = lambda line: None,
    more: Callable[[Path, dict], object] = lambda folder, files: None,
) -> dict:
    """Write the model into the folder `out` as GGUF files, one of each kind.

    Parameters
    ----------
    lora
        Leave the base as it is, and write the adapter beside it, as a file of its own that llama.cpp adds as it runs:
        nothing of the fine-tune is rounded then, whatever the base is stored in.
    check
        Ask each file through llama.cpp, and compare with transformers from the same weights; see `gguf.prove`.
    more
        Called with the folder and {file name: its entry} before the folder gets its name, to put more into it.

    Returns
    -------
    dict
        What is also written to `out`/export.json: the source, and for each file its kind, bytes, types and proof.

    Raises
    ------
    InputError
        If `out` exists, a kind is unknown, an optional package is missing, the disk has no room, or `merge` refuses.
        `out` is then as it was.
    RunError
        If llama.cpp fails, or answers from a file otherwise than it should.
    """
    _check_kinds(what, kinds, lora, check)
    if out.exists():
        raise InputError(f"{out}: is there already; choose another folder or delete it")
    name, source = name_of(what), local_directory(what.base_model)
    shards = source.glob("*.safetensors")
    stored = sum(path.stat().st_size for path in shards)
    check_room(out, stored * (4 + 2 * len(kinds)))  # a model of 16 bits in 32, twice, and each kind in 32 at most
    with written_whole(out) as folder:
        folder.mkdir()
        scratch = folder.parent / "scratch"
        scratch.mkdir()
        model, made = source, {"model": name}
        if what.checkpoints:
            show(f"merging onto the {base} base" if not lora else f"the {base} base, as it is")
            weights = dict.fromkeys(what.checkpoints, 0.0) if lora else what.checkpoints
            model, made = scratch / "model", merge(weights, what.base_model, scratch / "model", base)
            del made["memory"]
        files, adapter, factors = {}, None, None
        if lora:
            [checkpoint] = what.checkpoints
            adapter = folder / f"{name}.lora.gguf"
            factors, made["checkpoints"] = read_adapters(what.checkpoints)
            lora_to_gguf(checkpoint, model, adapter)
            files[adapter.name] = {"kind": "lora", "bytes": adapter.stat().st_size}
        for kind in kinds:
            file = folder / f"{name}{'-base' if lora else ''}.{kind}.gguf"
            show(file.name)
            _write(model, file, kind, name, scratch)
            files[file.name] = {"kind": kind, "bytes": file.stat().st_size, "types": tensor_types(file)}
            if check:
                files[file.name]["proof"] = found = prove(file, model, kind, factors, adapter)
                show(f"llama.cpp against transformers: {in_words(found)}")
        exported = {"source": made, "files": files}
        write_json(folder / "export.json", exported)
        more(folder, files)
    return exported


def _check_kinds(what: Resolved, kinds: Sequence[str], lora: bool, check: bool) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        raise InputError(f"--type {', '.join(unknown or kinds)}: give some of {', '.join(KINDS)}, each once")
    require(*[QUANTISER] * bool(set(kinds) & FILE_TYPES.keys()), *[SERVER] * check)
    if lora and list(what.checkpoints.values()) != [1.0]:
        raise InputError(f"--lora: {name_of(what)} is not one adapter as it was trained; give a run and one checkpoint")


def _write(model: Path, file: Path, kind: str, name: str, scratch: Path) -> None:
    if kind not in FILE_TYPES:
        to_gguf(model, file, kind, name)
        return
    whole = scratch / "whole.gguf"
    if not whole.exists():
        to_gguf(model, whole, "f32", name)
    quantise(whole, file, kind)


def ollama(
    what: Resolved,
    out: Path,
    form: PromptFormat,
    kind: str = "f16",
    user: str = "User",
    char: str = "Assistant",
    **options,
) -> dict:
    """Write a GGUF file and a Modelfile with the format's template and stop strings; `options` as `gguf` takes them.

    Raises
    ------
    InputError
        As `gguf`, and if the format cannot be said in a Modelfile.
    """
    modelfile("x", form, "", user, char)  # said before the minutes that a model takes

    def more(folder: Path, files: dict) -> None:
        names = {entry["kind"]: name for name, entry in files.items()}
        note = f"{name_of(what)}, prompt format {form.name}; from this folder: ollama create NAME -f Modelfile"
        text = modelfile(names[kind], form, names.get("lora", ""), user, char, note)
        (folder / "Modelfile").write_text(text, encoding="utf-8")

    return gguf(what, out, [kind], more=more, **options)


def axolotl(recipe: Recipe, out: Path, name: str) -> list[Path]:
    """Write NAME.yml, which Axolotl trains from, and its dataset, NAME.jsonl, into the folder `out`.

    Raises
    ------
    InputError
        If `out` exists, or Axolotl has no such base model.
    """
    if recipe.base_model == "tiny":
        raise InputError("tiny: random weights that the kit makes, Axolotl has no such model; give another recipe")
    if out.exists():
        raise InputError(f"{out}: is there already; choose another folder or delete it")
    examples = load_examples(recipe.dataset)
    dataset = [{"path": f"{name}.jsonl", "ds_type": "json", "type": "completion"}]
    base = HUB_IDS.get(recipe.base_model, recipe.base_model)
    theirs = recipe.replace(base_model=base, datasets=dataset, output_dir=f"out/{name}")
    with written_whole(out) as folder:
        folder.mkdir()
        write_axolotl_jsonl(examples, folder / f"{name}.jsonl")
        note = f"# {len(examples)} examples; from this folder: axolotl train {name}.yml\n"
        (folder / f"{name}.yml").write_text(note + theirs.to_yaml(), encoding="utf-8")
    return [out / f"{name}.yml", out / f"{name}.jsonl"]
