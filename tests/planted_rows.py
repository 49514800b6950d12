"""Does `mini-symposium examples` find a row that was planted? `PYTHONPATH=tests .venv/bin/python -m planted_rows`.

Each set has eight held-out prompts with their good answers, and a ninth row: one that contradicts a row, a garbled one,
or one in another language, all three harmful; or a near-duplicate of a row. A harmful row is found if its verdict is
that it harms or conflicts, a near-duplicate if it or its original is redundant. The table grows by a line for each
set, and what is in it is not measured again:

    PYTHONPATH=tests .venv/bin/python -m planted_rows [figures/examples/planted.csv] [--sets 20]
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import pandas as pd

from mini_symposium.data.dataset import load_examples
from mini_symposium.data.held_out import load_held_out
from mini_symposium.evaluation.influence import Influence
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory
from mini_symposium.training.leave_one_out import leave_one_out

ROWS = 8
HARMFUL = ("contradiction", "garbled", "German")
FOUND = {**{kind: {"harms", "conflicts"} for kind in HARMFUL}, "duplicate": {"redundant"}}


def planted_set(number: int, kind: str) -> list[dict]:
    """Eight rows, and a planted one at the end."""
    pick = random.Random(f"{kind} {number}")
    prompts = [p for p in load_held_out(split="more") if p.category in ("fact", "explanation", "trade-off")]
    first = pick.choice([p for p in prompts if p.category == "fact"])  # whose bad answer is a wrong fact
    *rows, other = [first, *pick.sample([p for p in prompts if p is not first], ROWS)]
    words = other.good.split()
    pick.shuffle(words)
    german = pick.choice(load_examples("tests/fixtures/german.md"))
    query, answer = {
        "contradiction": (first.query, first.bad),
        "garbled": (other.query, " ".join(words)),
        "German": (german.query, german.sections[-1].text.strip()),
        "duplicate": (f"Please tell me: {first.query}", first.good),
    }[kind]
    pairs = [*((row.query, row.good) for row in rows), (query, answer)]
    return [{"prompt": f"### New Query\n{q}\n\n### Complete Response\n", "completion": a} for q, a in pairs]


def line(found: Influence, kind: str, number: int) -> dict:
    """What a set's measurement says of the planted row, and of how many other rows it says that they do harm."""
    verdicts = [set(verdict.split(", ")) for verdict in found.summary()["verdict"]]
    *others, planted = verdicts
    asked = [planted, others[0]] if kind == "duplicate" else [planted]
    influence = found.by_seed.mean(0)
    return {
        **{"kind": kind, "set": number, "epoch": found.epoch, "seeds": len(found.seeds)},
        "found": any(verdict & FOUND[kind] for verdict in asked),
        "verdict": ", ".join(sorted(planted - {""})),
        "others_named": sum(bool(verdict & FOUND["garbled"]) for verdict in others),
        "carried": round(float(found.carried[-1]), 3),
        "on_its_original": round(float(influence[-1, 0]), 4),
        "on_rows": round(float(influence[-1, :ROWS].mean()), 4),
        "noise": round(float(found.noise()[0]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", nargs="?", default="figures/examples/planted.csv", type=Path)
    parser.add_argument("--sets", default=20, type=int, help="of harmful rows, and as many with a near-duplicate")
    asked = parser.parse_args()
    kinds = [kind for k in range(asked.sets) for kind in (HARMFUL[k % len(HARMFUL)], "duplicate")]
    lines = pd.read_csv(asked.table).to_dict("records") if asked.table.is_file() else []
    done = {(line["kind"], line["set"]) for line in lines}
    for place, kind in enumerate(kinds):
        number = place // 2
        if (kind, number) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            rows.write_text("".join(json.dumps(row) + "\n" for row in planted_set(number, kind)), encoding="utf-8")
            recipe = load_recipe("proxy", datasets=[{"path": str(rows), "type": "completion"}])
            found = leave_one_out(recipe, load_examples(rows), RunDirectory(Path(folder) / "run"))
        lines.append(line(found, kind, number))
        pd.DataFrame(lines).to_csv(asked.table, index=False)
        print(lines[-1], flush=True)
    table = pd.DataFrame(lines)
    print(
        table.groupby(table["kind"].isin(HARMFUL).map({True: "harmful", False: "duplicate"}))["found"].agg(
            ["sum", "count"]
        )
    )


if __name__ == "__main__":
    main()
