"""The playground's page as a contestant, without a browser.

Argument: a job as JSON, {"base": a run or model, "formats": their number, "tokens": new tokens of each answer}. With
"stop", it also measures how soon Stop ends a generation. With "bare", `generate` alone decodes the page's prompts, from
the same weights in the same process.
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
    page.bench._base.generation_config.eos_token_id = None  # so that every row has the same length
    drawn, draw = [], page.compare._draw  # `drawn`: the times at which a text was drawn

    def watch(cells, seconds=None):
        draw(cells, seconds)
        if any(cell.get("answer") for cell in cells):
            drawn.append(time.monotonic())

    page.compare._draw = watch

    def bare() -> dict:
        from mini_symposium.models.generation import generate

        cells = page.bench.cells(QUERY, page.chosen_formats(), ["base"])
        asked = [[cell[key] for cell in cells] for key in ("prompt", "stops")]
        return {"texts": [answer.text for answer in generate(page.bench._base, page.bench.tokenizer, *asked, tokens)]}

    def ask() -> dict:
        drawn.clear()
        pressed = time.monotonic()
        page._generate(None)
        _wait(page)
        texts = [cell["answer"] for cell in page.compare.cells]
        times = {"painted": painted, "seconds": time.monotonic() - pressed, "first": drawn[0] - pressed}
        if options.get("stop"):
            drawn.clear()
            page._generate(None)
            while not drawn and page._job:
                time.sleep(0.001)
            pressed = time.monotonic()
            page._stop()
            _wait(page)
            times["stopped"] = time.monotonic() - pressed
        return {**times, "texts": texts}

    Turn().run(bare if options.get("bare") else ask)


def _wait(page: Playground) -> None:
    while page._job:
        time.sleep(0.001)
    if 'role="alert"' in page.status.value:
        raise RuntimeError(page.status.value)


if __name__ == "__main__":
    main(*sys.argv[1:])
