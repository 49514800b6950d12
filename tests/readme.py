"""Write the results in README.md from the committed data: `make readme`. A test holds that nothing changes by it.

Each block stands between `<!-- name -->` and `<!-- /name -->`; what is outside of them holds no result.
"""

import json
import re
from dataclasses import asdict
from textwrap import fill

import numpy as np

from mini_symposium.claims.evidence import Evidence
from mini_symposium.claims.ledger import judge
from mini_symposium.evaluation.best_epoch import load_curves, recommend
from mini_symposium.evaluation.influence import load_influence
from mini_symposium.files.writing import written_whole
from mini_symposium.run import ROOT, RunDirectory, open_run

README = ROOT / "README.md"
CURVES = {"proxy": "train --stop best -p NUM_EPOCHS=84", "base": "sweep --recipe base --only curve"}
"""How each committed curve was measured, by `mini-symposium ...`; of the sweep's seeds, the first."""


def finding() -> str:
    """What the committed curves say about the question behind the card, by model."""
    told = []
    for recipe in CURVES:
        run = open_run(f"figures/curve/{recipe}")
        curves = load_curves(run)
        best = [recommend(curve) for curve in curves.values()]
        at = " and ".join(f"at {each.learning_rate:g} after epoch {each.epoch} ({each.loss:.3f})" for each in best)
        seeds = [{"seed": run.recipe.seed, **asdict(curve)} for curve in curves.values()]
        [claim] = [row for row in judge(Evidence(run.recipe.scale, "cpu", {}, [], curves=seeds)) if row.id == "C0"]
        (least, most), wide = claim.interval, [each.last - each.first + 1 for each in best]
        apart = "not to be told from the high rate's" if least <= 0 <= most else "worse" if least > 0 else "better"
        start = f"{curves[max(curves)].means[0]:.3f}{'' if told else ' nats a token'}"
        told.append(
            f"On {run.recipe.base_model}, held-out loss starts at {start} and is best {at}. The low rate's best is "
            f"{apart}, {claim.value:+.3f} [{least:+.3f}, {most:+.3f}]; its good window has {wide[1]} epochs, the high "
            f"rate's {wide[0]}."
        )
    return f"{' '.join(told)} One seed, exploratory ({', '.join(f'`{how}`' for how in CURVES.values())})."


def verdicts() -> str:
    """The ledger as a table."""
    lines = ["| | the card says | proxy | measured |", "|---|---|---|---|"]
    for row in _ledger():
        answers = [answer for answer in row["answers"] or [row] if answer["value"] is not None]
        found = "; ".join(map(_answer, answers))
        row["needs"] = re.sub(r"n=(\d+), seeds=(\d+)", r"\1 prompts or rows, \2 seeds", row["needs"])
        told = "; to decide: ".join(part for part in (found, row["needs"]) if part)
        lines.append(f"| {row['id']} | {row['claim']} | **{row['verdict']}** | {told} |")
    return "\n".join(lines)


def _ledger() -> list[dict]:
    return json.loads((ROOT / "figures" / "claims" / "claims.json").read_text(encoding="utf-8"))


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
        f"{ratios['pass4_vs_solo4']:.2f} of four passes; eight formats at once {ratios['grid_vs_loop']:.2f} of one "
        f"`generate` after the other. {_by_size()}"
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
    fall, error = found.more_rows()
    at = f"epoch {found.epoch} of {found.learning_rate:g}, seeds: {len(found.seeds)}"
    return (
        f"On the proxy ({at}), without a row the loss on its twin, a similar row that is never trained on, changes by "
        f"{own:+.3f} nats a token, and on the other twins by {others:+.3f}; the other rows teach {share.min():.0%} to "
        f"{share.max():.0%} of what is learned of a row; twice as many rows would change the best held-out loss by "
        f"{-fall:+.2f} ± {error:.2f}."
    )


BLOCKS = {"finding": finding, "verdicts": verdicts, "speed": speed, "examples": examples}


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
