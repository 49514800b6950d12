"""The bench on an NVIDIA card: `make bench DEVICE=cuda`, rehearsed on a CPU at a tiny shape with REHEARSE=1.

All parts run in one process, a contestant whose every turn is a part; one that hangs or crashes costs no other part.
Weights are random and made where they stay: no network, no browser, no download of 14 GB.
"""

import copy
import gc
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from bench import compare, contestants
from bench.turns import Turn
from mini_symposium.data.dataset import load_examples
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_tokenizer, nf4, shape_of
from mini_symposium.models.devices import device, peak_memory
from mini_symposium.models.generation import generate
from mini_symposium.training import finetune, fused_lora, trainer
from mini_symposium.training.memory_plan import FAMILIES

SEVEN = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = 256


class _Norm(torch.autograd.Function):
    """`F.rms_norm` with a frozen weight. Counted is the one kernel that each pass is on CUDA, not what a CPU runs."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps, counts):
        ctx.arguments, ctx.counts = (x.detach(), shape, weight, eps), counts
        counts["aten::_fused_rms_norm"] += 1
        with _disable_current_modes():
            return torch.rms_norm(*ctx.arguments)

    @staticmethod
    def backward(ctx, upstream):
        x, *others = ctx.arguments
        ctx.counts["aten::_fused_rms_norm_backward"] += 1
        with _disable_current_modes():
            return torch.func.vjp(lambda x: torch.rms_norm(x, *others), x)[1](upstream) + (None,) * 4


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel on CUDA, on any device; those that copy into what they allocate launch two.

    Exact to a few in a hundred: attention's backward pass and a norm over many tensors launch some more.
    """

    FREE = ("empty", "detach", "alias", "view", "lift_fresh", "local_scalar_dense", "record_function", "is_same_size")
    TWO = ("constant_pad_nd", "select_backward", "slice_backward")

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __enter__(self):
        self.rms_norm = F.rms_norm
        if device().type == "cpu":
            F.rms_norm = lambda *arguments: _Norm.apply(*arguments, self.counts)
        return super().__enter__()

    def __exit__(self, *error):
        F.rms_norm = self.rms_norm
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or any(free in func.name() for free in self.FREE)):
            self.counts[func.name()] += 1 + any(two in func.name() for two in self.TWO)
        return func(*args, **(kwargs or {}))

    def found(self) -> dict:
        return {"launches": self.counts.total(), "most": dict(self.counts.most_common(8))}


class Profiled:
    """What one step launches on a card, and how long the card is busy with it."""

    def __enter__(self):
        self.profiler, self.began = torch.profiler.profile(), time.perf_counter()
        return self.profiler.__enter__()

    def __exit__(self, *error):
        torch.cuda.synchronize()
        self.wall = time.perf_counter() - self.began
        self.profiler.__exit__(*error)

    def found(self) -> dict:
        averages = self.profiler.key_averages()
        calls = {
            e.key: e.count for e in averages if "Launch" in e.key or e.key.startswith(("cudaMemcpy", "cudaMemset"))
        }
        kernels = [e for e in self.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return {
            "launches": sum(calls.values()),
            "calls": calls,
            "busy_seconds": sum(e.time_range.elapsed_us() for e in kernels) / 1e6,
            "profiled_seconds": self.wall,
            "most": dict(Counter(e.name[:80] for e in kernels).most_common(8)),
        }


class Steps:
    """In the place of a contestant's `Turn`, in this process: times `steps` steps after `warm`, may count one more."""

    def __init__(self, steps: int, warm: int = 2, counter=None):
        self.left, self.warm, self.counter, self.seconds, self.losses = steps + warm, warm, counter, [], []
        self.last = self.began = time.perf_counter()

    def wait(self, losses=None, **_) -> bool:
        synchronize()
        now = time.perf_counter()
        if losses is not None:
            self.losses.append(losses)
            self.seconds.append(now - self.last)
            self.left -= 1
        if self.left == 0 and self.counter:
            self.counter.__enter__()
        elif self.left < 0:
            self.counter.__exit__(None, None, None)
        self.last = time.perf_counter()
        return self.left > 0 or bool(self.counter and self.left == 0)

    def found(self) -> dict:
        return {
            "seconds": statistics.median(self.seconds[self.warm :]),
            "first_seconds": self.seconds[0],
            "mean_seconds": statistics.mean(self.seconds[self.warm :]),
            "peak_bytes": peak_memory(),
            "losses": self.losses,
            **(self.counter.found() if self.counter else {}),
        }


def synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable, times: int = 5) -> float:
    """The median of its seconds, after two times that are not counted."""
    seconds = []
    for _ in range(times + 2):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def random_base(folder: Path, family: str = "mistral", **shape) -> str:
    """A model's directory with its configuration and `tiny`'s tokenizer; `random_model` makes its weights."""
    folder.mkdir()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000}
    AutoConfig.for_model(
        family, num_key_value_heads=shape["num_attention_heads"] // 4 or 1, **shape, **ids
    ).save_pretrained(folder)
    for path in local_directory("tiny").glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    # A directory without weights is refused before anything reads them.
    save_file({str(n): torch.zeros(1) for n in range(shape["num_hidden_layers"])}, folder / "model.safetensors")
    return str(folder)


def random_model(base: str, *_, **__):
    """What loading `base` in NF4 gives, always with the same random weights, made one after another on the device."""
    config, quantizer = AutoConfig.from_pretrained(base), AutoHfQuantizer.from_config(nf4())
    config.quantization_config = quantizer.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantizer.preprocess_model(model=model, device_map={"": device()})
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device()).normal_(std=0.02)
            if parameter.dim() == 1 and name == "weight":  # of a norm
                made += 1
            if isinstance(module, Linear4bit) and name == "weight":
                options = {"quant_type": "nf4", "compress_statistics": True, "module": module}
                module.weight = Params4bit(made, requires_grad=False, **options)._quantize(device())
            else:
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device())
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


class Card:
    """The parts, each a method that returns its sections of the results."""

    def __init__(self, folder: Path, rehearse: bool):
        self.folder, self.rehearse, self.ratios, self.missing = folder, rehearse, {}, {}
        self.base = random_base(folder / "seven", **(SMALL if rehearse else SEVEN))
        self.tokenizer = load_tokenizer(self.base)
        self.rows = [self.tokenizer(example.text)["input_ids"] for example in load_examples(compare.DATASET)]
        self.rows = [row[:40] for row in self.rows] if rehearse else self.rows
        self.row = [list(itertools.chain(*self.rows))[: 40 if rehearse else TOKENS]]
        finetune.load_model = random_model
        trainer.FusedAdapters = partial(fused_lora.FusedAdapters, kind="cuda")  # on a CPU too, what a card computes
        contestants.AutoModelForCausalLM = type("Made", (), {"from_pretrained": staticmethod(random_model)})

    def measure(self, part: str) -> dict:
        """What a part found, its ratios, and what failed in it."""
        found, self.ratios, self.missing = {}, {}, {}
        try:
            found = getattr(self, part)()
        except Exception as error:
            self.missing[part] = said(error)
        return {"found": found, "ratios": self.ratios, "missing": self.missing}

    def train(self, name: str, kind: str = "ours", base: str = "", rows=None, steps: int = 6, counter=None, **options):
        """What `steps` steps of a contestant gave, {seconds, peak_bytes, losses}; None if it failed, see `missing`."""
        turn = Steps(2 if self.rehearse else steps, counter=counter)
        if kind == "ours":
            options = {"compiled": False} | options
        try:
            clear()
            with suppress(SystemExit):  # the contestant leaves when it has no further turn
                getattr(contestants, kind)(turn, base or self.base, rows or self.row, **options)
            return turn.found()
        except Exception as error:
            self.missing[name] = said(error)
            return None

    def compared(self, variants: dict[str, dict], **options) -> dict[str, dict]:
        """What each variant gave, by its name, without those that failed."""
        found = {name: self.train(name, **options, **more) for name, more in variants.items()}
        return {name: values for name, values in found.items() if values}

    def card(self) -> dict:
        """The card, its driver, and its own ceilings."""
        found = {"torch": torch.__version__, "cuda": torch.version.cuda}
        if not self.rehearse:
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
            told = subprocess.run(query, capture_output=True, text=True).stdout.strip().split(", ")
            found |= dict(zip(("name", "driver", "memory"), told, strict=False))
            found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        size = 256 if self.rehearse else 8192
        a = torch.randn(size, size, device=device(), dtype=torch.bfloat16)
        few = torch.ones(8, device=device())
        found["gemm_flop_per_second"] = 2 * size**3 / timed(lambda: a @ a)
        found["copied_bytes_per_second"] = 2 * a.nbytes / timed(a.clone)
        found["seconds_a_launch"] = timed(lambda: [few.add_(1) for _ in range(1000)]) / 1000
        return {"card": found}

    def correctness(self) -> dict:
        """Losses against plain PEFT's, by family; four adapters of a pass against each alone; NF4 against the CPU's."""
        families, shape = {}, SMALL | {"hidden_size": 64, "intermediate_size": 128}
        for family in ("mistral", "gemma2") if self.rehearse else FAMILIES:
            base = random_base(self.folder / family, family, **shape)
            both = self.compared({family: {}, f"{family}, PEFT": {"fast": False}}, base=base, rows=self.rows[:2])
            if len(both) == 2:
                ours, theirs = (each["losses"] for each in both.values())
                families[family] = apart(ours, theirs)
        base = random_base(self.folder / "several", **shape)
        alone = {f"alone, {k}": {"adapters": 4, "only": k} for k in range(4)}
        kinds = {"4 in a pass": {"adapters": 4}, "4 bits": {"adapters": 4, "resident": False}, **alone}
        kept = {"resident": True, "checkpointing": False}
        found = self.compared({name: kept | more for name, more in kinds.items()}, base=base)
        losses = {name: values["losses"] for name, values in found.items()}
        steps = zip(*(losses[name] for name in alone), strict=True)
        return {
            "correctness": {
                "families_differ_by": families,
                "adapters_differ_from_alone_by": apart(
                    losses["4 in a pass"], [[one for [one] in step] for step in steps]
                ),
                "4_bits_differ_from_resident_by": apart(losses["4 bits"], losses["4 in a pass"]),
                "nf4": self._nf4(),
            }
        }

    def _nf4(self) -> dict[str, dict]:
        """Of weights quantised on the CPU and here: the share that differ; a 4-bit layer's error, relative."""
        found = {}
        for shape in ((1000, 96), (256, 512)) if self.rehearse else ((1000, 96), (4096, 4096), (14336, 4096)):
            torch.manual_seed(0)
            weight = (torch.randn(shape) * 0.02).bfloat16()
            (packed, state), (theirs, their_state) = (
                quantize_4bit(weight.to(where), quant_type="nf4", compress_statistics=True)
                for where in ("cpu", device())
            )
            moved = copy.deepcopy(state)
            moved.to(device())
            wanted, here = dequantize_4bit(packed, state), dequantize_4bit(theirs, their_state)
            layer = Linear4bit(shape[1], shape[0], False, torch.bfloat16, quant_type="nf4", device="meta")
            layer.weight = Params4bit(weight.to(device()), requires_grad=False, quant_type="nf4")._quantize(device())
            x = torch.randn(33, shape[1], device=device(), dtype=torch.bfloat16)
            product = x.float() @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
            found["x".join(map(str, shape))] = {
                "differ": (wanted != here.cpu()).float().mean().item(),
                "differ_if_quantised_on_the_cpu": (
                    (wanted != dequantize_4bit(packed.to(device()), moved).cpu()).float().mean().item()
                ),
                "error_of_a_layer": ((layer(x).float() - product).norm() / product.norm()).item(),
            }
        return found

    def step(self) -> dict:
        """A training step: ours and stock TRL's, each with activations kept or recomputed, and its products alone."""
        recomputed = {"checkpointing": True}
        variants = {
            "ours": {"resident": True, "checkpointing": False},
            "stock TRL": {"kind": "stock_trl"},
            "ours, 4 bits": {"resident": False, "checkpointing": False},
            "ours, 4 bits, recomputed": {"resident": False, **recomputed},
            "stock TRL, checkpointing": {"kind": "stock_trl", **recomputed},
        }
        found = self.compared(variants)
        times = {name: values["seconds"] for name, values in found.items()}
        for ours, theirs, key in (
            ("ours", "stock TRL", "step_vs_stock_trl"),
            ("ours, 4 bits", "stock TRL", "step_4_bits_vs_stock_trl"),
        ):
            if {ours, theirs} <= set(times):
                self.ratios[key] = times[ours] / times[theirs]
        tokens = len(self.row[0])
        width = 256 if self.rehearse else 4096
        a, b = (torch.randn(n, width, device=device(), dtype=torch.bfloat16) for n in (tokens, width))
        rate = 2 * tokens * width**2 / timed(lambda: a @ b.T)
        shape = shape_of(self.base)
        weights = shape.num_parameters() - shape.get_input_embeddings().weight.numel()
        return {
            "step": {
                "tokens": tokens,
                "seconds": times,
                "peak_bytes": {name: values["peak_bytes"] for name, values in found.items()},
                "losses": {name: values["losses"] for name, values in found.items()},
                "gemm_flop_per_second": rate,
                "floor_seconds": 4 * weights * tokens / rate,
            }
        }

    def launches(self) -> dict:
        """Kernels that one of our steps launches at 32 layers: counted from its operators, on a card profiled too."""
        base = random_base(self.folder / "deep", **SMALL | {"num_hidden_layers": 32}) if self.rehearse else self.base
        found: dict = {}
        for name, options in {
            "4 bits": {"resident": False, "checkpointing": False},
            "4 bits, recomputed": {"resident": False, "checkpointing": True},
            "resident": {"resident": True, "checkpointing": False},
        }.items():
            for how, counter in {"operators": Launches, "profiled": None if self.rehearse else Profiled}.items():
                if counter and (values := self.train(f"{name}, {how}", base=base, counter=counter(), **options)):
                    found.setdefault(name, {})[how] = values | {"losses": None}
        return {"launches": found}

    def together(self) -> dict:
        """K adapters in one pass against K passes with one, the base dequantised or in 4 bits."""
        found = {}
        for key, resident in {"pass": True, "pass, 4 bits": False}.items():
            ways = {str(k): {"adapters": k, "resident": resident, "checkpointing": False} for k in (1, 2, 4)}
            values = self.compared(ways)
            times = {k: each["seconds"] for k, each in values.items()}
            ratios = {k: seconds / int(k) / times["1"] for k, seconds in times.items()} if "1" in times else {}
            peaks = {k: each["peak_bytes"] for k, each in values.items()}
            found[key] = {"tokens": len(self.row[0]), "seconds": times, "peak_bytes": peaks, "ratio_to_solo": ratios}
            if {"1", "4"} <= set(values):
                one, four = ([losses[:1] for losses in values[k]["losses"]] for k in ("1", "4"))
                found[key]["losses_differ_by"] = apart(one, four) / one[0][0]
        if (ratio := found["pass"]["ratio_to_solo"].get("4")) is not None:
            self.ratios["pass4_vs_solo4"] = ratio
        return found

    def compiled(self) -> dict:
        """Our step with compiled layers, which the kit does not choose on a card yet: seconds, kernels, first step."""
        found = {}
        for name, resident in {"ours": True, "ours, 4 bits": False}.items():
            options = {"resident": resident, "checkpointing": False, "compiled": True}
            counter = Launches() if self.rehearse else Profiled()
            if values := self.train(f"{name}, compiled", counter=counter, **options):
                found[name] = values
        return {"compiled": found}

    def grid(self) -> dict:
        """8 formats x 4 queries from a base in 4 bits with an adapter: as one batch, and one at a time."""
        clear()
        model = get_peft_model(random_model(self.base), LoraConfig(**contestants.LORA)).eval()
        model.generation_config.eos_token_id = None  # so that every row has the same length
        prompts = [form.render(query) for query in compare.QUERIES for form in FORMATS.values()]
        prompts, new = (prompts[:4], 4) if self.rehearse else (prompts, compare.GRID_TOKENS)
        few = prompts[:: max(1, len(prompts) // 4)]
        times = {
            "grid": timed(lambda: generate(model, self.tokenizer, prompts, None, new), 1),
            "one at a time": timed(lambda: [generate(model, self.tokenizer, [one], None, new) for one in few], 1)
            * (len(prompts) / len(few)),
        }
        self.ratios["grid_vs_one_at_a_time"] = times["grid"] / times["one at a time"]
        return {"grid": {"rows": len(prompts), "tokens": new, "seconds": times, "peak_bytes": {"grid": peak_memory()}}}

    def epochs(self) -> dict:
        """Hours of 600 epochs of the dataset's rows, from one epoch as the kit plans it for this card."""
        hours = {}
        for adapters in (1, 2):
            if found := self.train(f"{adapters} in a pass", rows=self.rows, steps=len(self.rows), adapters=adapters):
                hours[str(adapters)] = found["mean_seconds"] * len(self.rows) * 600 / 3600
        return {"600_epochs_hours": hours}


def clear() -> None:
    """Free what the last variant held, and measure the peak anew."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference between the losses of two trainings, step by step and adapter by adapter.

    >>> apart([[1.0, 2.0]], [[1.0, 2.5]])
    0.5
    """
    return max(abs(a - b) for steps in zip(one, other, strict=True) for a, b in zip(*steps, strict=True))


def said(error: Exception) -> str:
    """An error on one line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = next(iter(str(error).strip().splitlines()), "")[:300]
    return f"{type(error).__name__}: {message} ({Path(place.filename).name}:{place.lineno})"


def main(job: str) -> None:
    options, turn = json.loads(job), Turn(device().type)
    with tempfile.TemporaryDirectory() as folder:
        card, parts = Card(Path(folder), options["rehearse"]), iter(options["parts"])
        turn.run(lambda: card.measure(next(parts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
