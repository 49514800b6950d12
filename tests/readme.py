"""Write the results in README.md from the committed data: `make readme`. A test holds that nothing changes by it.

Each block stands between `<!-- name -->` and `<!-- /name -->`; what is outside of them holds no result.
"""

import json
import re
from dataclasses import asdict
from textwrap import fill

import numpy as np

from mini_symposium.claims.evidence import Evidence, load_all_evidence
from mini_symposium.claims.ledger import judge
from mini_symposium.claims.verdicts import INCONCLUSIVE
from mini_symposium.evaluation.best_epoch import load_curves, recommend
from mini_symposium.evaluation.influence import load_influence
from mini_symposium.figures.style import scientific
from mini_symposium.files.writing import written_whole
from mini_symposium.run import ROOT, RunDirectory, open_run
from mini_symposium.training.forecast import read_log

README = ROOT / "README.md"
CURVES = "proxy", "base"
"""Recipes with a committed curve: `train --stop best -p NUM_EPOCHS=84`, and of `sweep --recipe base --only curve` the
first seed."""


def finding() -> str:
    """What the committed curves say about the question behind the card, by model."""
    falls, gaps, windows = [], [], []
    for recipe in CURVES:
        run = open_run(f"figures/curve/{recipe}")
        curves = load_curves(run)
        best = [recommend(curve) for curve in curves.values()]
        at = " and ".join(f"{each.loss:.3f} at {scientific(each.learning_rate)} (epoch {each.epoch})" for each in best)
        falls.append(f"on {run.recipe.base_model} from {curves[max(curves)].means[0]:.3f} to {at}")
        seeds = [{"seed": run.recipe.seed, **asdict(curve)} for curve in curves.values()]
        gaps += [row for row in judge(Evidence(run.recipe.scale, "cpu", {}, [], curves=seeds)) if row.id == "C0"]
        windows.append([each.last - each.first + 1 for each in best])
    worse, better = (all(sign * gap.interval[0 if sign > 0 else 1] > 0 for gap in gaps) for sign in (1, -1))
    apart = "is worse" if worse else "is better" if better else "is not told apart on each"
    by = " and ".join("{:.3f} [{:.3f}, {:.3f}]".format(abs(gap.value), *map(abs, gap.interval)) for gap in gaps)
    high, low = (" and ".join(map(str, each)) for each in zip(*windows, strict=True))
    return (
        f"Held-out loss, in nats a token, falls {'; '.join(falls)}. The low rate's best {apart}, by {by} (95%; row by "
        f"row, each at the epoch that is best for the others); it stays near it for {low} epochs, the high rate for "
        f"{high}. One seed each (`sweep --only curve`), not judged."
    )


def verdicts() -> str:
    """The ledger as a table: of each claim the verdict by model, and what was measured of the first that can tell."""
    models = _ledgers()
    headings = ["proxy, exploratory" if name == "exploratory" else name for name in models]
    lines = [f"| | the card says | {' | '.join(headings)} | measured |", "|---" * (3 + len(models)) + "|"]
    for same in zip(*models.values(), strict=True):
        found = [row for row in same if row["value"] is not None]
        shown = next((row for row in found if row["verdict"] != INCONCLUSIVE), (found or same)[0])
        answers = [answer for answer in shown["answers"] or [shown] if answer["value"] is not None]
        told = "; ".join(map(_answer, answers))
        if shown["verdict"] == INCONCLUSIVE:
            needs = re.sub(r"n=(\d+), seeds=(\d+)", r"\1 prompts or rows, \2 seeds", shown["needs"])
            told = "; to decide: ".join(part for part in (told, needs) if part)
        said = ["–" if row["value"] is None else f"**{row['verdict']}**" for row in same]
        lines.append(f"| {shown['id']} | {shown['claim']} | {' | '.join(said)} | {told} |")
    return "\n".join(lines)


def _ledgers() -> dict[str, list[dict]]:
    return {name: [row.row() for row in judge(each)] for name, each in load_all_evidence("figures/claims").items()}


def _answer(answer: dict) -> str:
    between = "" if answer["interval"] is None else " [{:.2g}, {:.2g}]".format(*answer["interval"])
    equal = f" at equal {answer['equal']}" if answer.get("equal") else ""
    return f"{answer['metric']}{equal}: {answer['value']:.2g}{between}"


def speed() -> str:
    """The step against its peers."""
    found = json.loads((ROOT / "figures" / "bench-cpu.json").read_text(encoding="utf-8"))
    ratios, where = found["ratios"], found["environment"]
    return (
        f"On {where['cores']} cores ({where['processor'].replace('(R)', '')}) a training step of "
        f"{found['step']['tokens']} tokens takes {ratios['step_vs_stock_trl']:.2f} of stock TRL's time, "
        f"{ratios['step_vs_peft']:.2f} of a bare PEFT loop's, {ratios['step_vs_litgpt']:.2f} of LitGPT's and "
        f"{ratios['step_vs_llama_factory']:.2f} of LLaMA-Factory's; four learning rates in one pass "
        f"{ratios['pass4_vs_solo4']:.2f} of four passes; answers in eight formats at once "
        f"{ratios['grid_vs_loop']:.2f} of one after the other. {_by_size()}"
    )


def _by_size() -> str:
    """A step of three models against plain PEFT's, where no processor instructions for matrices help."""
    found = json.loads((ROOT / "figures" / "bench-cpu-epyc.json").read_text(encoding="utf-8"))
    sizes = {name: each["vs_peft"] for name, each in found["sizes"].items() if name != "amx"}
    told = ", ".join(f"{share:.2f} ({name})" for name, share in sizes.items())
    return (
        f"On {found['environment']['processor']} without AMX it takes {found['ratios']['step_vs_peft']:.2f} of plain "
        f"PEFT's, and of larger models {told}."
    )


def examples() -> str:
    """What the thirteen rows teach each other."""
    found = load_influence(RunDirectory("figures/examples"))
    share, n = found.carried, len(found.rows)
    twins = found.by_seed.mean(0)[:, n:]
    own, others = twins.diagonal().mean(), twins[~np.eye(n, dtype=bool)].mean()
    at = f"epoch {found.epoch} of {scientific(found.learning_rate)}, seeds: {len(found.seeds)}"
    return (
        f"On the proxy ({at}), leaving a row out changes the loss on its twin, a similar row that is never trained on, "
        f"by {own:+.3f} nats a token, and on the other twins by {others:+.3f}; the other rows teach {share.min():.0%} "
        f"to {share.max():.0%} of a row."
    )


def seven() -> str:
    """What the sizes that were measured foresee for the card's own model, from the last lines in the log."""
    lines = [line for line in read_log(ROOT / "figures/forecasts/log.jsonl") if "Mistral" in line["base_model"]]
    high, low = ({line["learning_rate"]: line for line in lines}[rate] for rate in (1e-6, 1e-7))

    def told(line: dict, moment: str) -> str:
        epoch, least, most = line[moment]
        return f"{epoch:,.0f} ({least:,.0f} to {most:,.0f})"

    return (
        f"Nobody has trained Mistral-7B here. By its size (`forecast --recipe paper --by-size`) it would recite at "
        f"epoch {told(high, 'recited')} of 1e-6, where the card says about 100, and be about best, half known, "
        f"at epoch {told(low, 'known')} of 1e-7, where the card stopped at 600; in brackets, 90% intervals. "
        f"`make reproduce RECIPE=paper` and `forecast --check runs/paper` score [it](figures/forecasts/log.jsonl)."
    )


BLOCKS = {"finding": finding, "verdicts": verdicts, "speed": speed, "examples": examples, "seven": seven}


def rendered(text: str) -> str:
    """`text` with each block's content written anew."""
    for name, write in BLOCKS.items():
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if len(block.findall(text)) != 1:
            raise ValueError(f"README.md: has no block {name}, or two")
        before, after = block.split(text)[0], block.split(text)[-1]
        wrapped = "\n".join(line if line.startswith(("|", "-")) else fill(line, 120) for line in write().split("\n"))
        text = f"{before}<!-- {name} -->\n{wrapped}\n<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    text = rendered(README.read_text(encoding="utf-8"))
    with written_whole(README) as temporary:
        temporary.write_text(text, encoding="utf-8")
