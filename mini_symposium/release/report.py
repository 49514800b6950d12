"""What a run has shown, on one page: an HTML file that needs no network, no script and no other file.

Every number comes from the run's own files. What has not been measured yet is named, with the command that measures it.
"""

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from mini_symposium.data.dataset import describe, recipe_examples
from mini_symposium.errors import InputError
from mini_symposium.evaluation.best_epoch import in_words, load_curves
from mini_symposium.evaluation.influence import load_influence
from mini_symposium.figures.style import RATES_DO_NOT_TRANSFER, SCALES
from mini_symposium.files.writing import written_whole
from mini_symposium.release.model_card import ledger, table, training
from mini_symposium.run import RunDirectory

PICTURES = {
    "overfitting": ("When to stop", "notebook 02 with FOLDS, or `mini-symposium train --stop best`"),
    "influence": ("What each example teaches", "`mini-symposium examples RUN`"),
    "loss_curves": ("Training loss", "notebook 03"),
    "memorization": ("What is known by heart", "notebook 03"),
    "example_loss": ("Example by example", "notebook 03"),
    "recitation": ("Recitation", "notebook 05"),
    "pass_rates": ("Held-out prompts passed, by format", "notebook 05"),
    "format_grid": ("Words copied from the training rows, by format", "notebook 05"),
    "survival": ("Which files still contain the fine-tune", "notebook 04"),
    "ledger": ("The card's claims", "notebook 06, or `mini-symposium claims RUN`"),
}
"""{name of a picture: (its heading, what draws it)}"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; }} h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.2rem; break-after: avoid; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.85rem; overflow-wrap: break-word; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.25rem 0.5rem; text-align: left; vertical-align: top; }}
pre {{ background: #f5f5f5; padding: 0.7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.85rem; }}
thead {{ display: table-header-group; }} tr, img, pre {{ break-inside: avoid; }} @page {{ margin: 15mm; }}
</style></head><body>
{body}</body></html>
"""


def write_report(run: RunDirectory, out: str | Path = "") -> Path:
    """Write a run's report, by default to RUN/report.html, in place of an older one; return its path.

    Raises
    ------
    InputError
        If the run has no recipe, a file of it is damaged, or `out` is a folder.
    """
    target = Path(out) if out else run.path / "report.html"
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file, as {target / 'report.html'}")
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")  # text of a dataset stays text
    body = markdown.render("\n\n".join(_sections(run)))
    with written_whole(target) as temporary:
        temporary.write_text(PAGE.format(title=escape(run.path.name), body=body), encoding="utf-8")
    return target


def _sections(run: RunDirectory) -> Iterator[str]:
    recipe, environment, missing = run.recipe, run.environment(), []
    examples = recipe_examples(recipe)[0]
    rates = run.learning_rates()
    yield f"# {run.path.name}"
    yield (
        f"`{recipe.base_model}`, fine-tuned with QLoRA on {len(examples)} examples. Scale: "
        f"{SCALES.get(recipe.scale, recipe.scale)}{RATES_DO_NOT_TRANSFER.get(recipe.scale, '')}."
    )
    metrics = {rate: run.metrics(rate) for rate in rates}
    said = {"overfitting": in_words(load_curves(run), metrics)}
    if found := load_influence(run):
        said["influence"] = found.in_words()
    said["survival"] = run.results().get("04_merge", {}).get("survival", {}).get("sentence", "")
    for name, (heading, how) in PICTURES.items():
        picture = run.figures / f"{name}.png"
        if not picture.is_file():
            missing.append(f"- {heading}: {how}")
            continue
        encoded = base64.b64encode(picture.read_bytes()).decode()
        yield f"## {heading}\n\n![{heading}](data:image/png;base64,{encoded})"
        yield "\n\n".join(_plain(line) for line in said.get(name, "").splitlines())
    if missing:
        yield "\n".join(["## Not measured yet", "", *missing])
    rows = describe(examples)["examples"]
    keys = {"source": "where", "query": "query", "words": "words", "learned_words": "words learned"}
    yield table("Dataset", list(keys.values()), [[_plain(str(row[key])) for key in keys] for row in rows])
    yield from training(run, recipe, len(examples)) if rates else ()
    yield from ledger(run)
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    told = {key: _plain(str(value)) for key, value in environment.items()} | {"packages": packages}
    yield table("Environment", ("what", "recorded"), [(_plain(key), value) for key, value in told.items()])
    yield f"## To do it again\n\n```\nmini-symposium reproduce --recipe {run.recipe_file} --run NEW_FOLDER\n```"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is.

    >>> _plain("*a* <b> [c](d)")
    '\\\\*a\\\\* \\\\<b\\\\> \\\\[c\\\\](d)'
    """
    return "".join(f"\\{character}" if character in "\\`*_[]<>#!~&" else character for character in text)
