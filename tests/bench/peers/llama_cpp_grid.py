"""llama.cpp on a grid of prompts, one slot of its server for each. Runs in .venv-bench.

Arguments: a GGUF file, a JSON file with the token ids of the prompts, the number of new tokens.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xllamacpp
from bench.turns import Turn


def main(model: str, prompts: str, tokens: str) -> None:
    turn = Turn()
    rows, new = json.loads(Path(prompts).read_text()), int(tokens)
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = len(rows)
    params.n_ctx = len(rows) * 64 * -(-(max(map(len, rows)) + new) // 64)  # all slots together
    params.n_batch = 2048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    server = xllamacpp.Server(params)
    greedy = {"max_tokens": new, "temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}

    def grid() -> dict:
        with ThreadPoolExecutor(len(rows)) as threads:
            answers = list(threads.map(lambda ids: server.handle_completions({"prompt": ids, **greedy}), rows))
        assert all(answer["usage"]["completion_tokens"] == new for answer in answers)
        return {"texts": [answer["choices"][0]["text"] for answer in answers]}

    turn.run(grid)
    os._exit(0)  # the server's threads would keep the process alive


if __name__ == "__main__":
    main(*sys.argv[1:])
