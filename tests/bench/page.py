"""The playground's page as a contestant, without a front end; argument: {"base": ..., "formats": ..., "tokens": ...}.

With "bare", what the page would ask is decoded by `generate` alone, from the same weights in the same process.
"""

import json
import sys
import time

import psutil

from bench.turns import Turn
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.playground.page import Playground
from mini_symposium.playground.workbench import Workbench

QUERY = "Explain why the sky is blue."


def main(job: str) -> None:
    options = json.loads(job)
    formats, tokens = list(FORMATS)[: options["formats"]], options["tokens"]
    page = Playground(Workbench(options["base"]), QUERY, formats, ["base"], tokens)
    painted = time.time() - psutil.Process().create_time()
    page.begin()
    _wait(page)
    page.bench._base.generation_config.eos_token_id = None  # every row is to do the same work
    came, draw = [], page.compare._draw

    def watch(cells, seconds=None):
        draw(cells, seconds)
        if any(cell.get("answer") for cell in cells):
            came.append(time.monotonic())

    page.compare._draw = watch

    def bare() -> dict:
        from mini_symposium.models.generation import generate

        cells = page.bench.cells(QUERY, page.chosen_formats(), ["base"])
        asked = [[cell[key] for cell in cells] for key in ("prompt", "stops")]
        return {"texts": [answer.text for answer in generate(page.bench._base, page.bench.tokenizer, *asked, tokens)]}

    def ask() -> dict:
        seconds, first = _asked(page, came)
        texts = [cell["answer"] for cell in page.compare.cells]
        found = {"painted": painted, "seconds": seconds, "first": first, "texts": texts}
        if options.get("stop"):
            came.clear()
            page._generate(None)
            while not came and page._busy():
                time.sleep(0.001)
            pressed = time.monotonic()
            page._stop()
            _wait(page)
            found["stopped"] = time.monotonic() - pressed
        return found

    Turn().run(bare if options.get("bare") else ask)


def _asked(page: Playground, came: list[float]) -> tuple[float, float]:
    """Press Generate; seconds until all is there, and until the first text is drawn."""
    came.clear()
    pressed = time.monotonic()
    page._generate(None)
    _wait(page)
    return time.monotonic() - pressed, came[0] - pressed


def _wait(page: Playground) -> None:
    while page._busy():
        time.sleep(0.001)
    if page.error:
        raise page.error


if __name__ == "__main__":
    main(*sys.argv[1:])
