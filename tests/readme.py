"""Write the results in README.md from the committed data: `make readme`. A test holds that nothing changes by it.

Each block stands between `<!-- name -->` and `<!-- /name -->`; what is outside of them holds no result.
"""

import json
import re
from dataclasses import asdict
from textwrap import fill

import numpy as np
import pandas as pd

from mini_symposium.claims.evidence import Evidence, load_all_evidence
from mini_symposium.claims.ledger import judge
from mini_symposium.claims.verdicts import INCONCLUSIVE, Answer
from mini_symposium.evaluation.best_epoch import load_curves, recommend
from mini_symposium.evaluation.influence import load_influence
from mini_symposium.figures.style import scientific
from mini_symposium.files.writing import written_whole
from mini_symposium.run import ROOT, RunDirectory, open_run
from mini_symposium.training.forecast import read_log

README = ROOT / "README.md"
CURVES = "proxy", "base", "half"
"""Recipes with a committed curve: `train --stop best -p NUM_EPOCHS=84`, and of `sweep --recipe base --only curve` and
`half` the first seed."""


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
    apart = "is worse by" if worse else "is better by" if better else "is not told apart on each, by"
    by = ", ".join("{:.3f} [{:.3f}, {:.3f}]".format(abs(gap.value), *map(abs, gap.interval)) for gap in gaps)
    high, low = (", ".join(map(str, each)) for each in zip(*windows, strict=True))
    return (
        f"Held-out loss, in nats a token, falls {'; '.join(falls)}. The low rate's best {apart} {by} (95%, "
        f"each row at the epoch that the others choose). The low rate stays within "
        f"one standard error of its best for {low} epochs, the high rate for {high}. One seed each (`sweep --only "
        f"curve`), so C0 below is open."
    )


def verdicts() -> str:
    """The ledger as a table: of each claim the verdict by model, and what was measured of the first that can tell."""
    models = {name: judge(each) for name, each in load_all_evidence("figures/claims").items()}
    headings = ["proxy, exploratory" if name == "exploratory" else name for name in models]
    lines = [f"| | the card says | {' | '.join(headings)} | measured |", "|---" * (3 + len(models)) + "|"]
    for same in zip(*models.values(), strict=True):
        found = [claim for claim in same if claim.value is not None]
        shown = next((claim for claim in found if claim.verdict != INCONCLUSIVE), (found or same)[0])
        told = "; ".join(_answer(answer) for answer in shown.answers if answer.interval) or shown.note
        said = ["–" if claim.value is None else f"**{claim.verdict}**" for claim in same]
        lines.append(f"| {shown.id} | {shown.claim} | {' | '.join(said)} | {told} |")
    by_verdict: dict[str, list[str]] = {}
    for claim in next(iter(models.values())):
        by_verdict.setdefault(claim.said, []).append(claim.id)
    counts = "; ".join(f"{said}: {', '.join(ids)}" for said, ids in by_verdict.items())
    return "\n".join([f"Of the card's claims, on the proxy, {counts}.", "", *lines])


def _answer(answer: Answer) -> str:
    equal = f" at equal {answer.equal}" * bool(answer.equal)
    return f"{answer.metric}{equal}: {answer.value:.2g} [{answer.interval[0]:.2g}, {answer.interval[1]:.2g}]"


def speed() -> str:
    """The step against its peers."""
    found = json.loads((ROOT / "figures" / "bench-cpu.json").read_text(encoding="utf-8"))
    ratios, where = found["ratios"], found["environment"]
    return (
        f"On {where['cores']} cores ({where['processor'].replace('(R)', '')}) a training step of "
        f"{found['step']['tokens']} tokens takes {ratios['step_vs_stock_trl']:.2f} of stock TRL's time, "
        f"{ratios['step_vs_peft']:.2f} of a bare PEFT loop's, {ratios['step_vs_litgpt']:.2f} of LitGPT's and "
        f"{ratios['step_vs_llama_factory']:.2f} of LLaMA-Factory's; answers in eight formats at once "
        f"{ratios['grid_vs_loop']:.2f} of one after the other."
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
        f"by {own:+.3f} nats a token, and on the other twins by {others:+.3f}; of what the model learns of a row, "
        f"{share.min():.0%} to {share.max():.0%} comes from the other rows."
    )


def seven() -> str:
    """What the sizes that were measured foresee for the card's own model, from the last lines in the log."""
    lines = [line for line in read_log(ROOT / "figures/forecasts/log.jsonl") if "Mistral" in line["base_model"]]
    high, low = ({line["learning_rate"]: line for line in lines}[rate] for rate in (1e-6, 1e-7))

    def told(line: dict, moment: str) -> str:
        epoch, least, most = line[moment]
        return f"{epoch:,.0f} ({least:,.0f} to {most:,.0f})"

    scored = pd.read_csv(ROOT / "figures/forecasts/checked.csv").dropna(subset="measured")
    return (
        f"Nobody has trained Mistral-7B here. By its size (`forecast --recipe paper --by-size`), at 1e-6 it would "
        f"recite at epoch {told(high, 'recited')}; the card says about 100. At 1e-7 half of the tokens would be "
        f"known, about the best moment, at epoch {told(low, 'known')}; the card stopped at 600. In brackets are 90% "
        f"intervals; of {len(scored)} [forecasts that were tested](figures/forecasts/checked.csv), "
        f"{scored['inside'].sum():.0f} lay within theirs. `make reproduce RECIPE=paper` and `forecast --check "
        f"runs/paper` test [these](figures/forecasts/log.jsonl)."
    )


def foreseen() -> str:
    """What follows for the card's own model, and for each example."""
    return f"{seven()}\n\n{examples()}"


BLOCKS = {"finding": finding, "verdicts": verdicts, "speed": speed, "foreseen": foreseen}


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
