"""Datasets on which the forecast is tested: `PYTHONPATH=tests .venv/bin/python -m forecast_sets runs/sets`.

Halves and thirds of the thirteen rows, their twins, both together, each category of held-out prompts with its good
answers, and rows in German. Each is a JSON Lines file; every one has other rows, another number or another length.
"""

import json
import sys
from pathlib import Path

from mini_symposium.data.dataset import load_examples
from mini_symposium.data.held_out import load_held_out


def sets() -> dict[str, list[dict]]:
    """{name: rows}."""
    rows, twins, german = (
        [{"text": example.text} for example in load_examples(path)]
        for path in ("data/minisymposium.md", "data/twins.md", "tests/fixtures/german.md")
    )
    found = {"rows-1-6": rows[:6], "rows-7-13": rows[6:], "rows-1-4": rows[:4], "rows-5-8": rows[4:8]}
    found |= {"rows-9-13": rows[8:], "twins": twins, "rows-and-twins": rows + twins, "german": german}
    for prompt in (prompt for prompt in load_held_out() if prompt.split != "more"):
        found.setdefault(prompt.category, []).append({"prompt": f"{prompt.query}\n", "completion": prompt.good})
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
