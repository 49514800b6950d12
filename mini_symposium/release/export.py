"""A run's model, or a model directory, as files for other programs: llama.cpp, Ollama, Axolotl.

A folder gets its name only when all of it is written and every GGUF file in it has passed `gguf.check_answers`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mini_symposium.data.dataset import load_examples, write_axolotl_jsonl
from mini_symposium.data.prompt_formats import PromptFormat
from mini_symposium.errors import InputError
from mini_symposium.files.writing import check_new, check_room, write_json, written_whole
from mini_symposium.models.adapters import find_checkpoints, read_adapters, with_base
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.catalog import hub_id
from mini_symposium.models.merge import merge
from mini_symposium.models.safetensors_files import weight_files
from mini_symposium.recipe import Recipe
from mini_symposium.release.chat_frontends import modelfile
from mini_symposium.release.gguf import (
    FILE_TYPES,
    QUANTISER,
    SERVER,
    check_answers,
    describe_check,
    lora_to_gguf,
    quantise,
    require,
    tensor_types,
    to_gguf,
)
from mini_symposium.run import Resolved, read_object, resolve

KINDS = ("f32", "f16", "bf16", *FILE_TYPES)
"""Kinds of GGUF files: llama.cpp's converter writes the first three, its quantiser the others."""


def choose(
    run_or_model: str, checkpoint: Sequence[str] = (), learning_rate: float = 0.0, base_model: str = ""
) -> Resolved:
    """A run with the checkpoints to release, by default the last of its lowest learning rate; a model directory; or an
    adapter that no run trained, on `base_model` or the base that it names.
    """
    resolved = with_base(resolve(run_or_model, "run", *["adapter", "model"] * (not checkpoint)), base_model)
    if resolved.kind == "run":
        return replace(resolved, checkpoints=find_checkpoints(resolved.run, checkpoint, learning_rate))
    local_directory(resolved.base_model)  # refuses a damaged model before anything is written
    return resolved


def name_of(released: Resolved) -> str:
    """The name of the files to write: the model folder's name, or run, learning rate and epochs."""
    if not released.checkpoints or released.kind == "adapter":
        return released.path.name
    first = next(iter(released.checkpoints))
    return f"{released.path.name}-{first.parents[1].name}-{'+'.join(path.name for path in released.checkpoints)}"


def gguf(
    released: Resolved,
    out: Path,
    kinds: Sequence[str] = ("f16",),
    base: str = "nf4",
    lora: bool = False,
    check: bool = True,
    show: Callable[[str], object] = lambda line: None,
    ollama_modelfile: str = "",
) -> dict:
    """Write the model into the folder `out` as GGUF files, one of each kind.

    Parameters
    ----------
    lora
        Write the base without the adapter, and the adapter to a file of its own, which llama.cpp adds at run time. The
        fine-tune is then not rounded, whatever the kind of the base's file.
    check
        Compare llama.cpp's answers from each file with transformers'; see `gguf.check_answers`.
    ollama_modelfile
        Text of a Modelfile that goes into the folder too.

    Returns
    -------
    dict
        The content of `out`/export.json: source, where the weights come from; files, with each file's kind, bytes,
        types of its matrices, and proof, the result of `gguf.check_answers`.

    Raises
    ------
    InputError
        If `out` exists, a kind is unknown, an optional package is missing, the disk has no room, or `merge` refuses.
        `out` is then unchanged.
    RunError
        If llama.cpp fails, or a file does not pass the check.
    """
    _check_kinds(released, kinds, lora, check)
    check_new(out)
    name, model = name_of(released), local_directory(released.base_model)
    size = sum(path.stat().st_size for path in weight_files(model))
    check_room(out, size * (4 + 2 * len(kinds)))  # if stored in 16 bits: two float32 copies, and one for each kind
    with written_whole(out) as folder:
        folder.mkdir()
        scratch = folder.parent / "scratch"
        scratch.mkdir()
        provenance, files, factors, adapter = {"model": name}, {}, None, None
        if released.checkpoints:
            show(f"the {base} base, as it is" if lora else f"merging onto the {base} base")
            weights = dict.fromkeys(released.checkpoints, 0.0) if lora else released.checkpoints
            model = scratch / "model"
            provenance = merge(weights, released.base_model, model, base)
            del provenance["memory"]
        if lora:
            [checkpoint] = released.checkpoints
            factors, provenance["checkpoints"] = read_adapters(released.checkpoints)
            adapter = folder / _lora_file(released)
            lora_to_gguf(checkpoint, model, adapter)
            files[adapter.name] = {"kind": "lora", "bytes": adapter.stat().st_size}
        for kind in kinds:
            file = folder / _gguf_file(released, kind, lora)
            show(file.name)
            _write(model, file, kind, name, scratch)
            files[file.name] = {"kind": kind, "bytes": file.stat().st_size, "types": tensor_types(file)}
            if check:
                files[file.name]["proof"] = proof = check_answers(file, model, kind, factors, adapter)
                show(f"llama.cpp against transformers: {describe_check(proof)}")
        exported = {"source": provenance, "files": files}
        write_json(folder / "export.json", exported)
        if ollama_modelfile:
            (folder / "Modelfile").write_text(ollama_modelfile, encoding="utf-8")
    return exported


def _check_kinds(released: Resolved, kinds: Sequence[str], lora: bool, check: bool) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        raise InputError(f"--type {', '.join(unknown or kinds)}: give some of {', '.join(KINDS)}, each once")
    if set(kinds) & FILE_TYPES.keys():
        require(QUANTISER)
    if check:
        require(SERVER)
    if lora and list(released.checkpoints.values()) != [1.0]:
        raise InputError(f"--lora: {name_of(released)} is not a single adapter; give a run and one checkpoint")
    for adapter in released.checkpoints if lora else ():
        if read_object(adapter / "adapter_config.json").get("use_rslora"):
            raise InputError(f"--lora: {adapter}: is rsLoRA, which llama.cpp scales differently; export it merged")


def _gguf_file(released: Resolved, kind: str, lora: bool) -> str:
    return f"{name_of(released)}{'-base' if lora else ''}.{kind}.gguf"


def _lora_file(released: Resolved) -> str:
    return f"{name_of(released)}.lora.gguf"


def _write(model: Path, file: Path, kind: str, name: str, scratch: Path) -> None:
    if kind not in FILE_TYPES:
        to_gguf(model, file, kind, name)
        return
    whole = scratch / "whole.gguf"
    if not whole.exists():
        to_gguf(model, whole, "f32", name)
    quantise(whole, file, kind)


def ollama(
    released: Resolved,
    out: Path,
    form: PromptFormat,
    kind: str = "f16",
    user: str = "User",
    char: str = "Assistant",
    lora: bool = False,
    **options,
) -> dict:
    """Write a GGUF file, and a Modelfile with the format's template and stop strings; `options` as `gguf` takes them.

    Raises what `gguf` raises, and an InputError if a Modelfile cannot hold the format.
    """
    note = f"{name_of(released)}, prompt format {form.name}; from this folder: ollama create NAME -f Modelfile"
    adapter = _lora_file(released) if lora else ""
    text = modelfile(_gguf_file(released, kind, lora), form, adapter, user, char, note)
    return gguf(released, out, [kind], lora=lora, ollama_modelfile=text, **options)


def axolotl(recipe: Recipe, out: Path, name: str) -> list[Path]:
    """Write the recipe as NAME.yml for Axolotl, and its dataset as NAME.jsonl, into the folder `out`.

    Raises
    ------
    InputError
        If `out` exists, or Axolotl has no such base model.
    """
    if recipe.base_model == "tiny":
        raise InputError("tiny: the kit makes its random weights, so Axolotl has no such model; give another recipe")
    check_new(out)
    examples = load_examples(recipe.dataset)
    kind = "completion" if recipe.train_on_inputs else "input_output"  # completion learns all of a row, in Axolotl
    dataset = [{"path": f"{name}.jsonl", "ds_type": "json", "type": kind}]
    base = hub_id(recipe.base_model)
    exported = recipe.replace(base_model=base, datasets=dataset, output_dir=f"out/{name}")
    with written_whole(out) as folder:
        folder.mkdir()
        write_axolotl_jsonl(examples, folder / f"{name}.jsonl", answers_only=not recipe.train_on_inputs)
        note = f"# {len(examples)} examples; from this folder: axolotl train {name}.yml\n"
        (folder / f"{name}.yml").write_text(note + exported.to_yaml(), encoding="utf-8")
    return [out / f"{name}.yml", out / f"{name}.jsonl"]
