"""Runs llama.cpp's server in a process of its own: reads a job as JSON from stdin, writes greedy replies to stdout.

`gguf.ask` writes the job and reads the replies, also JSON. The KV cache, which llama.cpp would round, stays in float32,
so that any difference from transformers comes from the file.
"""

import json
import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

STOP_REASONS = {"eos": "eos", "word": "stop string", "limit": "length"}
SLOTS = 4
"""Prompts that the server answers at the same time."""


def main() -> None:
    import xllamacpp as llama

    job = json.loads(sys.stdin.read())
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the server's own output goes to stderr
    params = llama.CommonParams()
    params.model.path = job["file"]
    if job["lora"]:
        adapter = llama.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = job["lora"], 1.0
        params.lora_adapters = [adapter]
    longest = max(len(prompt.encode()) for prompt in job["prompts"]) + 8 + job["tokens"]  # a token has a byte or more
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * 64 * -(-longest // 64)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    server = llama.Server(params)

    def post(path: str, **body) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def reply(prompt: str, stop: list[str]) -> dict:
        tokenized = post("/tokenize", content=prompt, add_special=True, parse_special=True)
        greedy = {"temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True}
        completion = post("/completion", prompt=prompt, n_predict=job["tokens"], stop=stop, **greedy)
        return {
            "prompt_ids": tokenized["tokens"],
            "ids": completion["tokens"],
            "text": completion["content"],
            "stop_reason": STOP_REASONS[completion["stop_type"]],
        }

    with ThreadPoolExecutor(SLOTS) as pool:
        print(json.dumps(list(pool.map(reply, job["prompts"], job["stops"]))), file=stdout, flush=True)
    os._exit(0)  # the server's threads would keep the process alive


if __name__ == "__main__":
    main()
