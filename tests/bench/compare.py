"""The comparisons. Whoever is compared takes turns in one run, so that a machine that slows down slows them all.

A ratio is the median over the turns of our time over the other's in the same round. Nothing here is a test: it
measures, prints and writes down.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from bench.turns import Contestant, child_environment
from mini_symposium.data.dataset import load_examples
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.models.devices import device, training_dtype
from mini_symposium.release.gguf import to_gguf
from mini_symposium.run import ROOT, environment, find

PROXY, SEVEN = "SmolLM2-135M-Instruct", "random-mistral-7b"
PEERS = ROOT / ".venv-bench" / "bin" / "python"
LLAMA_FACTORY = ROOT / ".venv-llama-factory" / "bin" / "python"
TOKENS, GRID_TOKENS = 256, 64
QUERIES = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain why the sky is blue.",
    "List three uses of a brick.",
)


class Bench:
    """One run of comparisons.

    Attributes
    ----------
    found : dict
        What was measured, by comparison; `ratios`: {name: our time over the other's}; `measured`: when, and at which
        commit, by comparison.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say, self.cuda = folder, say, device().type == "cuda"
        self.base = SEVEN if self.cuda else PROXY
        self.found: dict = {
            "environment": machine(),
            "measured": {},
            "ratios": {},
            "missing": {},
        }
        tokenizer = load_tokenizer("tiny" if self.cuda else PROXY)
        examples = load_examples(find("data/minisymposium.md"))
        self.rows = [tokenizer(example.text)["input_ids"] for example in examples]
        self.text = [token for row in self.rows for token in row]
        self.prompts = [form.render(query) for query in QUERIES for form in FORMATS.values()]
        self.prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in self.prompts]

    def file(self, name: str, values) -> str:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(values))
        return str(path)

    def kit(self, name: str, kind: str, **options) -> Contestant:
        """A contestant of `contestants`; its first turn, with whatever it compiles, is over when it comes back."""
        job = json.dumps({"kind": kind, **options})
        return self.ready(name, sys.executable, ["-m", "bench.contestants", job])

    def peer(self, name: str, module: str, *arguments, python: Path = PEERS, how: str = "bench") -> Contestant | None:
        if not python.exists():
            self.found["missing"][name] = f"its environment is not there; `make {how}` sets it up"
            return None
        return self.ready(name, python, ["-m", f"bench.peers.{module}", *arguments])

    def ready(self, name: str, python, arguments) -> Contestant:
        self.say(f"{name}: starting")
        contestant = Contestant(name, python, arguments, self.folder)
        contestant.turn()
        return contestant

    @contextmanager
    def rounds(self, contestants: Sequence[Contestant | None], turns: int, times: int = 1):
        """Let them take turns of `times` pieces of work each; they leave at the end of the block."""
        present = [contestant for contestant in contestants if contestant]
        try:
            for number in range(turns):
                for contestant in present:
                    contestant.turn(times)
                self.say(f"round {number + 1} of {turns}: " + ", ".join(f"{c.name} {last(c):.2f} s" for c in present))
            yield {contestant.name: contestant for contestant in present}
        finally:
            for contestant in present:
                contestant.end()

    def row(self, tokens: int) -> str:
        return self.file(f"row-{tokens}", [self.text[:tokens]])

    def step(self) -> None:
        """One training step of 256 tokens: ours, the peers', and what the products alone would take."""
        rows = self.row(TOKENS)
        peers = []
        if not self.cuda:
            task = local_directory(PROXY), self.file("one-row", self.text[:TOKENS])
            peers = [
                self.peer("LitGPT", "litgpt_step", *task),
                self.peer("LLaMA-Factory", "llama_factory_step", *task, python=LLAMA_FACTORY, how="llama-factory"),
            ]
        contestants = [
            self.kit("products", "products"),
            self.kit("ours", "ours", base=self.base, rows=rows),
            self.kit("stock TRL", "stock_trl", base=self.base, rows=rows),
            None if self.cuda else self.kit("bare PEFT", "bare_peft", base=self.base, rows=rows),
            *peers,
        ]
        if self.cuda:
            contestants += [
                self.kit("ours, 4 bits", "ours", base=SEVEN, rows=rows, resident=False, checkpointing=True),
                self.kit("stock TRL, checkpointing", "stock_trl", base=SEVEN, rows=rows, checkpointing=True),
            ]
        with self.rounds(contestants, 8, 4) as there:
            rates = [turn["flop"] / turn["seconds"] for turn in there["products"].turns[1:]]
            weights = 7_110_660_096 if self.cuda else 134_515_008  # that multiply: not the embedding
            floors = [4 * weights * TOKENS / rate for rate in rates]
            times = {name: seconds(contestant) for name, contestant in there.items() if name != "products"}
            self.found["step"] = {
                "tokens": TOKENS,
                "seconds": {name: statistics.median(each) for name, each in times.items()},
                "peak_bytes": {name: there[name].turns[-1]["peak"] for name in times},
                "first_step_seconds": {name: there[name].first for name in times},
                "gemm_flop_per_second": statistics.median(rates),
                "floor_seconds": statistics.median(floors),
            }
            names = {
                "stock TRL": "step_vs_stock_trl",
                "bare PEFT": "step_vs_peft",
                "LitGPT": "step_vs_litgpt",
                "LLaMA-Factory": "step_vs_llama_factory",
            }
            for name, key in names.items():
                if name in times:
                    self.found["ratios"][key] = ratio(times["ours"], times[name])
            self.found["ratios"]["step_vs_floor"] = ratio(times["ours"], floors)
            if self.cuda:
                self.found["step"]["600_epochs_hours"] = {
                    name: statistics.median(each) * 600 * len(self.rows) / 3600 for name, each in times.items()
                }

    def profile(self) -> None:
        """Where our step spends its time."""
        with self.rounds(
            [self.kit("profile", "ours", base=self.base, rows=self.row(TOKENS), profile=True)], 4
        ) as there:
            measured = [turn["profile"] for turn in there["profile"].turns if "profile" in turn]
            self.found["profile_ms"] = {
                kind: round(statistics.median(one[kind] for one in measured), 1) for kind in measured[0]
            }

    def together(self) -> None:
        """K adapters in one pass against K passes with one each.

        On a CPU each adapter of a pass is computed by one thread, and in bfloat16 two threads round otherwise than one:
        losses are also compared with those of a pass with one thread.
        """
        sizes = (1, 2, 4, 8)
        rows = self.row(TOKENS)
        contestants = [self.kit(f"{k} in a pass", "ours", base=self.base, rows=rows, adapters=k) for k in sizes]
        if not self.cuda:
            contestants.append(self.kit("1, one thread", "ours", base=self.base, rows=rows, threads=1))
        with self.rounds(contestants, 5, 2) as there:
            times = {k: seconds(there[f"{k} in a pass"]) for k in sizes}

            def apart(other: str) -> float:
                pairs = zip(there["4 in a pass"].turns, there[other].turns, strict=True)
                return max(abs(a["losses"][0] / b["losses"][0] - 1) for a, b in pairs)

            self.found["pass"] = {
                "tokens": TOKENS,
                "seconds": {str(k): statistics.median(each) for k, each in times.items()},
                "peak_bytes": {str(k): there[f"{k} in a pass"].turns[-1]["peak"] for k in sizes},
                "ratio_to_solo": {str(k): ratio(each, [k * one for one in times[1]]) for k, each in times.items()},
                "losses_differ_by": apart("1 in a pass"),
            }
            if not self.cuda:
                self.found["pass"]["losses_differ_from_one_thread_by"] = apart("1, one thread")
            self.found["ratios"]["pass4_vs_solo4"] = self.found["pass"]["ratio_to_solo"]["4"]

    def lengths(self) -> None:
        """How a step grows with the length of its row."""
        self.found["lengths"] = {}
        for tokens in (128, 256, 512, 1024):
            options = {"base": self.base, "rows": self.row(tokens)}
            pair = [self.kit(f"ours {tokens}", "ours", **options), self.kit(f"TRL {tokens}", "stock_trl", **options)]
            with self.rounds(pair, 4, 2) as there:
                self.found["lengths"][str(tokens)] = {
                    name.split()[0]: {"seconds": statistics.median(seconds(c)), "peak_bytes": c.turns[-1]["peak"]}
                    for name, c in there.items()
                }

    def trajectory(self) -> None:
        """The loss of 100 steps over the thirteen examples against PEFT's own layers with float32 adapters.

        Where that is computed in bfloat16, also both in float32: what is left of the difference is not rounding. And
        how far bfloat16 by itself takes PEFT's losses, and how far ours.
        """
        options = {"base": self.base, "rows": self.file("rows", self.rows)}
        reference = "PEFT, float32 adapters"
        kinds = {"ours": {}, reference: {"fast": False}}
        if not self.cuda and training_dtype() == torch.bfloat16:
            kinds |= {f"{name}, in float32": more | {"float32": True} for name, more in kinds.items()}
        with self.rounds([self.kit(name, "ours", **options, **more) for name, more in kinds.items()], 100) as there:
            losses = {name: [turn["losses"][0] for turn in one.turns[1:]] for name, one in there.items()}

        def apart(one: str, other: str) -> float:
            return max(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))

        found = {"steps": 100, "losses": losses, "differ_by_at_most": apart("ours", reference)}
        if len(kinds) > 2:
            found["in_float32_by"] = apart("ours, in float32", f"{reference}, in float32")
            found["bfloat16_itself_by"] = apart(reference, f"{reference}, in float32")
            found["from_float32_by"] = apart("ours", f"{reference}, in float32")
        self.found["trajectory"] = found

    def memory(self) -> None:
        """Whether 600 epochs take more memory than ten; on random weights, for the host's side of it."""
        epochs = 600
        rows = [[token % 30000 for token in row[:64]] for row in self.rows]  # tiny has fewer words
        one = self.kit("600 epochs, tiny", "ours", base="tiny", rows=self.file("tiny-rows", rows))
        for _ in range(epochs * len(self.rows) - 1):
            one.turn()
        one.end()
        sizes = [turn["bytes"] for turn in one.turns]
        early = sizes[10 * len(self.rows)]
        self.found["memory"] = {"epochs": epochs, "after_10_epochs": early, "at_the_end": sizes[-1]}

    def merge(self) -> None:
        """Memory of a merge at Mistral-7B's shape: measured with one layer and with three, and drawn out to all 32."""
        found = {}
        for layers in (1, 3):
            folder = self.folder / f"{layers}-layers"
            line = [sys.executable, "-m", "bench.merge_memory", str(layers), str(folder)]
            options = {"env": child_environment(), "capture_output": True, "text": True, "check": True}
            done = [subprocess.run(line, **options) for _ in ("write", "merge")]
            found[layers] = json.loads(done[-1].stdout.splitlines()[-1])
            shutil.rmtree(folder)
            mib = {name: size / 2**20 for name, size in found[layers].items()}
            self.say(f"{layers} layers: {mib['predicted']:,.0f} MiB predicted, {mib['measured']:,.0f} MiB measured")
        whole = {
            name: found[3][name] + (32 - 3) * (found[3][name] - found[1][name]) / 2
            for name in ("predicted", "measured")
        }
        self.say(
            f"32 layers, by the step from 1 to 3: {whole['predicted'] / 2**20:,.0f} MiB predicted, "
            f"{whole['measured'] / 2**20:,.0f} MiB measured and drawn out"
        )
        self.found["merge"] = {"by_layers": {str(n): each for n, each in found.items()}, "7B": whole}

    def grid(self) -> None:
        """8 formats x 4 queries x 64 tokens as a batch, one at a time, and in llama.cpp."""
        options = {"base": PROXY, "tokens": GRID_TOKENS}
        prompts = self.file("prompts", self.prompts)
        gguf = self.folder / "proxy-f16.gguf"
        peer = None
        if PEERS.exists():
            to_gguf(local_directory(PROXY), gguf, "f16")
        peer = self.peer("llama.cpp", "llama_cpp_grid", gguf, self.file("ids", self.prompt_ids), GRID_TOKENS)
        with self.rounds([self.kit("grid", "grid", prompts=prompts, **options), peer], 5) as there:
            times = {name: seconds(contestant) for name, contestant in there.items()}
            peaks = {name: contestant.turns[-1]["peak"] for name, contestant in there.items()}
            texts = there["grid"].turns[-1]["texts"]
            if peer:
                self.found["ratios"]["grid_vs_llamacpp"] = ratio(times["grid"], times["llama.cpp"])
        for name, dtype in (("one at a time, float32", "float32"), ("one at a time, bfloat16", "bfloat16")):
            slow = Contestant(name, *self._loop(prompts, options, dtype), self.folder)
            with self.rounds([slow, self.kit("grid", "grid", prompts=prompts, **options)], 1) as there:
                times[name], peaks[name] = [slow.turns[0]["seconds"]], slow.turns[0]["peak"]
                same = sum(a == b for a, b in zip(slow.turns[0]["texts"], texts, strict=True))
                key = "grid_vs_loop" if dtype == "float32" else "grid_vs_bfloat16_loop"
                self.found["ratios"][key] = there["grid"].turns[-1]["seconds"] / slow.turns[0]["seconds"]
            if dtype == "float32":
                self.found.setdefault("grid", {})["rows_equal_to_one_at_a_time"] = same
        self.found["grid"] |= {
            "rows": len(self.prompts),
            "tokens": GRID_TOKENS,
            "seconds": {name: statistics.median(each) for name, each in times.items()},
            "peak_bytes": peaks,
            "seconds_by_rows": self._by_rows(options),
        }

    def page(self) -> None:
        """The playground's page: when it is up, when text comes, what it adds to the bare decode, how soon it stops."""
        options = {"base": "proxy", "formats": 8, "tokens": GRID_TOKENS, "stop": True}
        pair = [self._page("page", **options), self._page("bare decode", **options, bare=True)]
        with self.rounds(pair, 6) as there:
            turns = there["page"].turns[1:]
            self.found["page"] = {
                "painted_seconds": turns[0]["painted"],
                "first_text_seconds": statistics.median(turn["first"] for turn in turns),
                "stopped_seconds": max(turn["stopped"] for turn in turns),
                "seconds": {name: statistics.median(seconds(one)) for name, one in there.items()},
            }
            self.found["ratios"]["page_vs_bare"] = ratio(seconds(there["page"]), seconds(there["bare decode"]))
        many = self._page("100 generations", base="proxy", formats=1, tokens=4)
        for _ in range(119):
            many.turn()
        many.end()
        sizes = [turn["bytes"] for turn in many.turns]
        self.found["page"] |= {"bytes_after_20": sizes[19], "bytes_after_120": sizes[-1]}

    def _page(self, name: str, **options) -> Contestant:
        return self.ready(name, sys.executable, ["-m", "bench.page", json.dumps(options)])

    def _loop(self, prompts: str, options: Mapping, dtype: str) -> tuple[str, list[str]]:
        job = json.dumps({"kind": "loop", "prompts": prompts, "dtype": dtype, **options})
        return sys.executable, ["-m", "bench.contestants", job]

    def _by_rows(self, options: Mapping) -> dict[str, float]:
        some = {n: self.file(f"prompts-{n}", (self.prompts * 4)[:n]) for n in (1, 8, 32, 96)}
        contestants = [self.kit(f"{n} rows", "grid", prompts=path, **options) for n, path in some.items()]
        with self.rounds(contestants, 2) as there:
            return {str(n): statistics.median(seconds(there[f"{n} rows"])) for n in some}


def machine() -> dict:
    """The environment, its device and its processor."""
    said = subprocess.run(["lscpu"], capture_output=True, text=True).stdout if sys.platform == "linux" else ""
    named = [line.split(":")[1].strip() for line in said.splitlines() if line.startswith("Model name")]
    return environment(device=device().type, processor=named[0] if named else "unknown")


def last(contestant: Contestant) -> float:
    return contestant.turns[-1]["seconds"]


def seconds(contestant: Contestant) -> list[float]:
    """Of each turn but the first, which compiles and allocates."""
    return [turn["seconds"] for turn in contestant.turns[1:]]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of our time over theirs.

    >>> ratio([1.0, 2.0, 9.0], [2.0, 4.0, 3.0])
    0.5
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


PARTS = ("step", "profile", "together", "lengths", "trajectory", "grid", "page", "memory", "merge")


def run(parts: Sequence[str] = PARTS, say: Callable[[str], None] = print) -> dict:
    """Measure `parts`; see `Bench.found` for what comes back."""
    psutil.cpu_percent()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), say)
        for part in parts:
            if part == "grid" and bench.cuda:
                continue
            say(f"[{part}]")
            getattr(bench, part)()
            bench.found["measured"][part] = {key: bench.found["environment"][key] for key in ("commit", "recorded")}
        bench.found["processor_busy_percent"] = psutil.cpu_percent()
        return bench.found
