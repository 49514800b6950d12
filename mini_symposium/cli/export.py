"""`mini-symposium export ...`: a run's model, prompt formats, recipe or card as files for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from mini_symposium.cli.options import Base, BaseModel, Checkpoint, Checkpoints, Rate, Run, note_macros, say
from mini_symposium.run import open_run, resolve

app = typer.Typer(
    help="Write a run's model, prompt formats, recipe or card as files for other programs.",
    no_args_is_help=True,
)

RunOrModel = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="a run, a model or an adapter directory")]
Out = Annotated[str, typer.Option(help="folder to write")]
Lora = Annotated[
    bool, typer.Option("--lora", help="the base without the adapter, and the adapter beside it as a LoRA GGUF")
]
Check = Annotated[bool, typer.Option(help="compare llama.cpp's answers from each file with transformers'")]
Name = Annotated[str, typer.Option(help="replaces {{user}} or {{char}}, which Ollama lacks")]


def _say_files(out: str, exported: dict) -> None:
    for name, entry in exported["files"].items():
        types = ", ".join(f"{count} matrices in {kind}" for kind, count in entry.get("types", {}).items())
        say(f"{Path(out) / name}: {entry['bytes'] / 1e6:,.1f} MB" + f" ({types})" * bool(types))


@app.command()
def gguf(
    run_or_model: RunOrModel,
    out: Out,
    kind: Annotated[
        list[str] | None,
        typer.Option("--type", help="f32, f16, bf16, q8_0, q6_K, q5_K_M or q4_K_M; may be repeated; f16 if not given"),
    ] = None,
    lora: Lora = False,
    checkpoint: Checkpoints = None,
    learning_rate: Rate = 0,
    base: Base = "",
    check: Check = True,
    base_model: BaseModel = "",
):
    """GGUF files for llama.cpp, whose answers are compared with those of transformers on the same weights."""
    from mini_symposium.release import export

    released = export.choose(run_or_model, checkpoint or [], learning_rate, base_model)
    _say_files(out, export.gguf(released, Path(out), kind or ["f16"], base or released.trained_base, lora, check, say))


@app.command()
def ollama(
    run_or_model: RunOrModel,
    out: Out,
    format: Annotated[str, typer.Option(help='a built-in prompt format, "### Heading" or a preset.json')] = "new-query",
    kind: Annotated[str, typer.Option("--type", help="one type, as in `export gguf`")] = "f16",
    user: Name = "User",
    char: Name = "Assistant",
    lora: Lora = False,
    checkpoint: Checkpoints = None,
    learning_rate: Rate = 0,
    base: Base = "",
    check: Check = True,
    base_model: BaseModel = "",
):
    """A GGUF file and a Modelfile with the prompt format's template and stop strings."""
    from mini_symposium.data.prompt_formats import prompt_format
    from mini_symposium.release import export

    form = prompt_format(format)
    note_macros(form)
    released = export.choose(run_or_model, checkpoint or [], learning_rate, base_model)
    options = {"base": base or released.trained_base, "lora": lora, "check": check, "show": say}
    _say_files(out, export.ollama(released, Path(out), form, kind, user, char, **options))
    say(f"{Path(out) / 'Modelfile'}: from that folder, ollama create NAME -f Modelfile")


@app.command()
def sillytavern(
    out: Out,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help='a built-in prompt format, "### Heading" or a preset.json; may be repeated; all if not given'
        ),
    ] = None,
):
    """Instruct and context presets; `character` has {{user}} and {{char}}, as the card advises."""
    from mini_symposium.data.prompt_formats import FORMATS, prompt_format
    from mini_symposium.release.chat_frontends import write_sillytavern

    names = format or sorted(FORMATS, key=lambda name: name != "character")
    forms = [prompt_format(name) for name in names]
    for form in forms:
        note_macros(form)
    for path in write_sillytavern(forms, Path(out)):
        say(path)


@app.command()
def axolotl(
    run_or_recipe: Annotated[
        str, typer.Argument(metavar="RUN_OR_RECIPE", help="a run, the name of a recipe, or a recipe.yml")
    ],
    out: Out,
):
    """The recipe as Axolotl's YAML, and its dataset as JSONL."""
    resolved = resolve(run_or_recipe, "recipe", "run")
    from mini_symposium.release.export import axolotl as write

    name = resolved.path.name if resolved.kind == "run" else resolved.recipe.name
    for path in write(resolved.recipe, Path(out), name):
        say(path)


@app.command()
def card(
    run: Run,
    out: Out,
    checkpoint: Checkpoint = "",
    learning_rate: Rate = 0,
    license: Annotated[
        str, typer.Option(help="as the hub names it; if not given, the base model's where it is known")
    ] = "",
):
    """A model card from the run's own files; `out` may hold a model already."""
    directory = open_run(run)
    from mini_symposium.models.adapters import find_checkpoint
    from mini_symposium.release.model_card import write_card

    adapter = find_checkpoint(directory, checkpoint, learning_rate)
    for path in write_card(directory, Path(out), adapter, license):
        say(path)
    say(f"to upload it: hf upload YOU/NAME {out} --private")
