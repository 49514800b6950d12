"""The comparisons. The contestants take turns in one run, so that a machine that slows down slows all of them.

A ratio is the median over the rounds of our time divided by the other's time in the same round. Nothing here passes or
fails; it only measures.
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
from mini_symposium.errors import InputError
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_tokenizer, shape_of
from mini_symposium.models.devices import device, training_dtype
from mini_symposium.release.gguf import to_gguf
from mini_symposium.run import ROOT, environment

PROXY = "SmolLM2-135M-Instruct"
SIZES = ("gemma-3-270m", "Qwen2.5-Coder-0.5B-Instruct")
"""The other models whose step is measured, where their licences were accepted."""
PEERS = ROOT / ".venv-bench" / "bin" / "python"
LLAMA_FACTORY = ROOT / ".venv-llama-factory" / "bin" / "python"
TOKENS, GRID_TOKENS = 256, 64
CARD = {
    "card": 45,
    "correctness": 120,
    "step": 130,
    "launches": 60,
    "together": 100,
    "grid": 60,
    "epochs": 60,
    "compiled": 130,
}
"""{part of the bench on a card, see card.py: most seconds}; less than 12 minutes together."""
REHEARSED = [part for part in CARD if part != "compiled"]
"""What a rehearsal measures by default: on a CPU compiling takes longer than all the rest."""
DATASET = ROOT / "data" / "minisymposium.md"
QUERIES = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain why the sky is blue.",
    "List three uses of a brick.",
)


class Bench:
    """One run of the bench. Each part, a name in PARTS, is a method.

    Attributes
    ----------
    results : dict
        What each part measured, and beside that `environment`; `measured`: when and at which commit, by part;
        `ratios`: {name: our time / the other's}; `missing`: why a peer was not measured, by its name.
    """

    def __init__(self, folder: Path, show: Callable[[str], None]):
        self.folder, self.show = folder, show
        self.results: dict = {"environment": machine(), "measured": {}, "ratios": {}, "missing": {}}
        tokenizer = load_tokenizer(PROXY)
        examples = load_examples(DATASET)
        self.rows = [tokenizer(example.text)["input_ids"] for example in examples]
        self.text = [token for row in self.rows for token in row]
        self.prompts = [form.render(query) for query in QUERIES for form in FORMATS.values()]
        self.prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in self.prompts]

    def file(self, name: str, values) -> str:
        """Write `values` as JSON for a contestant to read; return the path."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(values))
        return str(path)

    def kit(self, name: str, kind: str, **options) -> Contestant:
        """A contestant of the kind `kind` in contestants.py."""
        return self.start(name, "contestants", json.dumps({"kind": kind, **options}))

    def peer(self, name: str, program: str, *arguments, python: Path = PEERS, target: str = "bench"):
        """A contestant from peers/; None, and an entry in `missing`, if its environment is not installed."""
        if not python.exists():
            self.results["missing"][name] = f"it is not installed; `make {target}` installs it"
            return None
        return self.start(name, f"peers.{program}", *arguments, python=python)

    def start(self, name: str, program: str, *arguments, python: str | Path = sys.executable) -> Contestant:
        """Start a contestant, and let it do its first turn, in which it compiles and allocates."""
        self.show(f"{name}: starting")
        contestant = Contestant(name, python, ["-m", f"bench.{program}", *arguments], self.folder)
        contestant.turn()
        return contestant

    @contextmanager
    def rounds(self, contestants: Sequence[Contestant | None], rounds: int, times: int = 1):
        """In each round every contestant works `times` times. Yields {name: contestant}, and ends them afterwards."""
        present = {contestant.name: contestant for contestant in contestants if contestant}
        try:
            for number in range(rounds):
                seconds = [f"{name} {one.turn(times)['seconds']:.2f} s" for name, one in present.items()]
                self.show(f"round {number + 1} of {rounds}: {', '.join(seconds)}")
            yield present
        finally:
            for contestant in present.values():
                contestant.end()

    def row(self, tokens: int) -> str:
        """A file with one row, the first `tokens` tokens of the dataset."""
        return self.file(f"row-{tokens}", [self.text[:tokens]])

    def step(self) -> None:
        """One training step of 256 tokens: ours, the peers', and the floor: its matrix products at the best rate."""
        rows = self.row(TOKENS)
        task = local_directory(PROXY), self.file("one-row", self.text[:TOKENS])
        contestants = [
            self.kit("products", "products"),
            self.kit("ours", "ours", base=PROXY, rows=rows),
            self.kit("stock TRL", "stock_trl", base=PROXY, rows=rows),
            self.kit("bare PEFT", "bare_peft", base=PROXY, rows=rows),
            self.peer("LitGPT", "litgpt_step", *task),
            self.peer("LLaMA-Factory", "llama_factory_step", *task, python=LLAMA_FACTORY, target="llama-factory"),
        ]
        with self.rounds(contestants, 8, 4) as there:
            rates = [turn["flop"] / turn["seconds"] for turn in there["products"].turns[1:]]
            weights = 134_515_008  # in products: without the embedding, a look-up
            floors = [4 * weights * TOKENS / rate for rate in rates]
            times = {name: seconds(contestant) for name, contestant in there.items() if name != "products"}
            self.results["step"] = {
                "tokens": TOKENS,
                "seconds": medians(times),
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
                    self.results["ratios"][key] = ratio(times["ours"], times[name])
            self.results["ratios"]["step_vs_floor"] = ratio(times["ours"], floors)

    def sizes(self) -> None:
        """Of the other models a step of 256 tokens, ours, with four adapters, and the peers', the floor, and a grid."""
        self.results["sizes"] = {"amx": torch.cpu._is_amx_tile_supported()}
        for base in SIZES:
            try:
                ids = [i for row in load_examples(DATASET) for i in load_tokenizer(base)(row.text)["input_ids"]]
            except InputError as error:  # its terms were not accepted, or it cannot be downloaded
                self.results["missing"][base] = str(error)
                continue
            rows = self.file(f"row-{base}", [ids[:TOKENS]])
            kinds = {"ours": "ours", "plain PEFT": "bare_peft", "stock TRL": "stock_trl"}
            contestants = [self.kit(f"{name}, {base}", kind, base=base, rows=rows) for name, kind in kinds.items()]
            contestants.append(self.kit(f"4 in a pass, {base}", "ours", base=base, rows=rows, adapters=4))
            with self.rounds([self.kit("products", "products"), *contestants], 6, 2) as there:
                rates = [turn["flop"] / turn["seconds"] for turn in there["products"].turns[1:]]
                times = {name: seconds(there[f"{name}, {base}"]) for name in kinds}
                first, four = there[f"ours, {base}"].first, there[f"4 in a pass, {base}"]
                pairs = zip(there[f"ours, {base}"].turns, four.turns, strict=True)
                apart = max(abs(one["losses"][0] / other["losses"][0] - 1) for one, other in pairs)
            shape = shape_of(base)
            tied = shape.get_output_embeddings().weight is shape.get_input_embeddings().weight
            weights = shape.num_parameters() - (0 if tied else shape.get_input_embeddings().weight.numel())
            floors = [4 * weights * TOKENS / rate for rate in rates]
            self.results["sizes"][base] = {
                "seconds": medians(times),
                "vs_peft": ratio(times["ours"], times["plain PEFT"]),
                "vs_stock_trl": ratio(times["ours"], times["stock TRL"]),
                "vs_floor": ratio(times["ours"], floors),
                "first_step_seconds": first,
                "pass4_vs_solo4": ratio(seconds(four), [4 * solo for solo in times["ours"]]),
                "losses_differ_by": apart,
                **self._grid_of(base),
            }

    def _grid_of(self, base: str, tokens: int = 24) -> dict:
        """A query in 8 formats as a batch, against one `generate` after the other."""
        prompts = self.file(f"prompts-{base}", [form.render(QUERIES[0]) for form in FORMATS.values()])
        options = {"base": base, "prompts": prompts, "tokens": tokens}
        job = json.dumps({"kind": "loop", **options})
        loop = Contestant(f"one at a time, {base}", sys.executable, ["-m", "bench.contestants", job], self.folder)
        with self.rounds([loop, self.kit(f"grid, {base}", "grid", **options)], 1) as there:
            single, batch = (one.turns[-1] for one in there.values())
        equal = sum(a == b for a, b in zip(single["texts"], batch["texts"], strict=True))
        return {
            "grid_vs_loop": batch["seconds"] / single["seconds"],
            "grid_equal": equal,
            "grid_rows": len(batch["texts"]),
        }

    def profile(self) -> None:
        """Where our step spends its time."""
        ours = self.kit("profile", "ours", base=PROXY, rows=self.row(TOKENS), profile=True)
        with self.rounds([ours], 4):
            profiles = [turn["profile"] for turn in ours.turns if "profile" in turn]
        by_kind = {kind: [profile[kind] for profile in profiles] for kind in profiles[0]}
        self.results["profile_ms"] = {kind: round(median, 1) for kind, median in medians(by_kind).items()}

    def together(self) -> None:
        """K adapters in one pass against K passes with one adapter each.

        On a CPU one thread computes each adapter of a pass. In bfloat16 two threads round differently from one, so the
        losses are also compared with those of one adapter and one thread.
        """
        sizes = (1, 2, 4, 8)
        rows = self.row(TOKENS)
        contestants = [self.kit(f"{k} in a pass", "ours", base=PROXY, rows=rows, adapters=k) for k in sizes]
        contestants.append(self.kit("1, one thread", "ours", base=PROXY, rows=rows, threads=1))
        with self.rounds(contestants, 5, 2) as there:
            times = {k: seconds(there[f"{k} in a pass"]) for k in sizes}

            def difference(other: str) -> float:
                pairs = zip(there["4 in a pass"].turns, there[other].turns, strict=True)
                return max(abs(a["losses"][0] / b["losses"][0] - 1) for a, b in pairs)

            self.results["pass"] = {
                "tokens": TOKENS,
                "seconds": {str(k): median for k, median in medians(times).items()},
                "peak_bytes": {str(k): there[f"{k} in a pass"].turns[-1]["peak"] for k in sizes},
                "ratio_to_solo": {str(k): ratio(ours, [k * solo for solo in times[1]]) for k, ours in times.items()},
                "losses_differ_by": difference("1 in a pass"),
            }
            self.results["pass"]["losses_differ_from_one_thread_by"] = difference("1, one thread")
            self.results["ratios"]["pass4_vs_solo4"] = self.results["pass"]["ratio_to_solo"]["4"]

    def lengths(self) -> None:
        """How a step grows with the length of its row."""
        self.results["lengths"] = {}
        for tokens in (128, 256, 512, 1024):
            options = {"base": PROXY, "rows": self.row(tokens)}
            pair = [self.kit(f"ours {tokens}", "ours", **options), self.kit(f"TRL {tokens}", "stock_trl", **options)]
            with self.rounds(pair, 4, 2) as there:
                self.results["lengths"][str(tokens)] = {
                    name.split()[0]: {"seconds": statistics.median(seconds(c)), "peak_bytes": c.turns[-1]["peak"]}
                    for name, c in there.items()
                }

    def trajectory(self) -> None:
        """The losses of 100 steps over the thirteen examples against those of PEFT's own layers with float32 adapters.

        Where both compute in bfloat16, they are also compared in float32, where a difference cannot come from rounding
        to bfloat16. Both bfloat16 trainings are compared with PEFT's in float32 too.
        """
        options = {"base": PROXY, "rows": self.file("rows", self.rows)}
        reference = "PEFT, float32 adapters"
        kinds = {"ours": {}, reference: {"fast": False}}
        if training_dtype() == torch.bfloat16:
            kinds |= {f"{name}, in float32": more | {"float32": True} for name, more in kinds.items()}
        with self.rounds([self.kit(name, "ours", **options, **more) for name, more in kinds.items()], 100) as there:
            losses = {name: [turn["losses"][0] for turn in one.turns[1:]] for name, one in there.items()}

        def difference(one: str, other: str) -> float:
            return max(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))

        result = {"steps": 100, "losses": losses, "differ_by_at_most": difference("ours", reference)}
        if len(kinds) > 2:
            result["in_float32_by"] = difference("ours, in float32", f"{reference}, in float32")
            result["bfloat16_itself_by"] = difference(reference, f"{reference}, in float32")
            result["from_float32_by"] = difference("ours", f"{reference}, in float32")
        self.results["trajectory"] = result

    def memory(self) -> None:
        """Whether 600 epochs take more memory than ten. On `tiny`, as only memory beside the model could grow."""
        epochs = 600
        rows = [[token % 30000 for token in row[:64]] for row in self.rows]  # within tiny's vocabulary
        one = self.kit("600 epochs, tiny", "ours", base="tiny", rows=self.file("tiny-rows", rows))
        for _ in range(epochs * len(self.rows) - 1):
            one.turn()
        one.end()
        sizes = [turn["bytes"] for turn in one.turns]
        early = sizes[10 * len(self.rows)]
        self.results["memory"] = {"epochs": epochs, "after_10_epochs": early, "at_the_end": sizes[-1]}

    def merge(self) -> None:
        """Memory of a merge at Mistral-7B's shape: measured with 1 layer and with 3, and extrapolated to all 32."""
        by_layers = {}
        for layers in (1, 3):
            folder = self.folder / f"{layers}-layers"
            command = [sys.executable, "-m", "bench.merge_memory", str(layers), str(folder)]
            for _ in ("write", "merge"):
                done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
            by_layers[layers] = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder)
        one, three = by_layers[1], by_layers[3]
        names = ("predicted", "measured")
        whole = {name: three[name] + (32 - 3) * (three[name] - one[name]) / 2 for name in names}
        for layers, sizes in {"1 layer": one, "3 layers": three, "all 32, extrapolated": whole}.items():
            self.show(f"{layers}: " + ", ".join(f"{sizes[name] / 2**20:,.0f} MiB {name}" for name in names))
        self.results["merge"] = {"by_layers": {str(n): sizes for n, sizes in by_layers.items()}, "7B": whole}

    def grid(self) -> None:
        """8 formats x 4 queries x 64 tokens as a batch, one at a time, and in llama.cpp."""
        options = {"base": PROXY, "tokens": GRID_TOKENS}
        prompts = self.file("prompts", self.prompts)
        gguf = self.folder / "proxy-f16.gguf"
        if PEERS.exists():
            to_gguf(local_directory(PROXY), gguf, "f16")
        peer = self.peer("llama.cpp", "llama_cpp_grid", gguf, self.file("ids", self.prompt_ids), GRID_TOKENS)
        with self.rounds([self.kit("grid", "grid", prompts=prompts, **options), peer], 5) as there:
            times = {name: seconds(contestant) for name, contestant in there.items()}
            peaks = {name: contestant.turns[-1]["peak"] for name, contestant in there.items()}
            texts = there["grid"].turns[-1]["texts"]
            if peer:
                self.results["ratios"]["grid_vs_llamacpp"] = ratio(times["grid"], times["llama.cpp"])
        for dtype, key in (("float32", "grid_vs_loop"), ("bfloat16", "grid_vs_bfloat16_loop")):
            name, job = f"one at a time, {dtype}", {"kind": "loop", "prompts": prompts, "dtype": dtype, **options}
            # Not by `start`: a first turn would take minutes, and this one compiles nothing.
            loop = Contestant(name, sys.executable, ["-m", "bench.contestants", json.dumps(job)], self.folder)
            with self.rounds([loop, self.kit("grid", "grid", prompts=prompts, **options)], 1) as there:
                turn = loop.turns[0]
                times[name], peaks[name] = [turn["seconds"]], turn["peak"]
                self.results["ratios"][key] = there["grid"].turns[-1]["seconds"] / turn["seconds"]
            if dtype == "float32":
                equal = sum(a == b for a, b in zip(turn["texts"], texts, strict=True))
        self.results["grid"] = {
            "rows_equal_to_one_at_a_time": equal,
            "rows": len(self.prompts),
            "tokens": GRID_TOKENS,
            "seconds": medians(times),
            "peak_bytes": peaks,
            "seconds_by_rows": self._by_rows(options),
        }

    def page(self) -> None:
        """The playground's page: seconds until it is up, shows text, and stops; its time against the bare decode's."""
        options = {"base": "proxy", "formats": 8, "tokens": GRID_TOKENS, "stop": True}
        jobs = {"page": options, "bare decode": {**options, "bare": True}}
        pair = [self.start(name, "page", json.dumps(job)) for name, job in jobs.items()]
        with self.rounds(pair, 6) as there:
            turns = there["page"].turns[1:]
            self.results["page"] = {
                "painted_seconds": turns[0]["painted"],
                "first_text_seconds": statistics.median(turn["first"] for turn in turns),
                "stopped_seconds": max(turn["stopped"] for turn in turns),
                "seconds": medians({name: seconds(one) for name, one in there.items()}),
            }
            self.results["ratios"]["page_vs_bare"] = ratio(seconds(there["page"]), seconds(there["bare decode"]))
        many = self.start("100 generations", "page", json.dumps({"base": "proxy", "formats": 1, "tokens": 4}))
        for _ in range(119):
            many.turn()
        many.end()
        sizes = [turn["bytes"] for turn in many.turns]
        self.results["page"] |= {"bytes_after_20": sizes[19], "bytes_after_120": sizes[-1]}

    def _by_rows(self, options: Mapping) -> dict[str, float]:
        files = {n: self.file(f"prompts-{n}", (self.prompts * 4)[:n]) for n in (1, 8, 32, 96)}
        contestants = [self.kit(f"{n} rows", "grid", prompts=file, **options) for n, file in files.items()]
        with self.rounds(contestants, 2) as there:
            return medians({str(n): seconds(there[f"{n} rows"]) for n in files})


def machine() -> dict:
    """What is measured on: versions, device and processor."""
    lscpu = subprocess.run(["lscpu"], capture_output=True, text=True).stdout if sys.platform == "linux" else ""
    names = [line.split(":")[1].strip() for line in lscpu.splitlines() if line.startswith("Model name")]
    return environment(device=device().type, processor=names[0] if names else "unknown")


def seconds(contestant: Contestant) -> list[float]:
    """Of each turn but the first, in which it compiles and allocates."""
    return [turn["seconds"] for turn in contestant.turns[1:]]


def medians(values: Mapping) -> dict:
    """The median of each list of numbers.

    >>> medians({"ours": [1.0, 2.0, 9.0]})
    {'ours': 2.0}
    """
    return {key: statistics.median(numbers) for key, numbers in values.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of our time divided by theirs.

    >>> ratio([1.0, 2.0, 9.0], [2.0, 4.0, 3.0])
    0.5
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


PARTS = ("step", "sizes", "profile", "together", "lengths", "trajectory", "grid", "page", "memory", "merge")


def run(parts: Sequence[str] = PARTS, show: Callable[[str], None] = print) -> dict:
    """Measure `parts`, `show` a line for each start and round, and return `Bench.results`."""
    psutil.cpu_percent()  # the next call counts from here
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), show)
        for part in parts:
            show(f"[{part}]")
            getattr(bench, part)()
            bench.results["measured"][part] = {key: bench.results["environment"][key] for key in ("commit", "recorded")}
        bench.results["processor_busy_percent"] = psutil.cpu_percent()
        return bench.results


def run_on_card(
    parts: Sequence[str], rehearse: bool, show: Callable[[str], None], keep: Callable[[dict], None] = lambda found: None
) -> dict:
    """As `run`, for parts of CARD, which one contestant measures, a part a turn; `keep` is given the results so far.

    A part that crashes or takes too long is given up, and a new contestant goes on with the next one.
    """
    found_on = machine() | {"device": "cuda, rehearsed on a CPU" if rehearse else "cuda"}
    results: dict = {"environment": found_on, "measured": {}, "ratios": {}, "missing": {}}
    worker = None
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            try:
                if worker is None:
                    job = json.dumps({"parts": parts[number:], "rehearse": rehearse})
                    worker = Contestant("card", sys.executable, ["-m", "bench.card", job], Path(folder), 120)
                worker.timeout = CARD[part] * (10 if rehearse else 1)  # a card's seconds, not those of a busy CPU
                turn = worker.turn()
                results |= turn["found"]
                for key in ("ratios", "missing"):
                    results[key] |= turn[key]
                show(f"[{part}] {turn['seconds']:.0f} s" + "".join(f"; {one} failed" for one in turn["missing"]))
            except RuntimeError as error:
                results["missing"][part], worker = str(error), None
                show(f"[{part}] {error}")
            results["measured"][part] = {key: found_on[key] for key in ("commit", "recorded")}
            keep(results)
        if worker:
            worker.end()
    return results
