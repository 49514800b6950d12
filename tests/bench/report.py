"""The tables and the picture of what the bench measured."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich.table import Table

from mini_symposium.errors import InputError
from mini_symposium.figures.style import COLOURS, GREY, SCALES, Picture, name_rows, styled, titled
from mini_symposium.run import read_object

CPU_BARS = (  # what, its key in `ratios`, at most
    ("training step, 256 tokens, against stock TRL QLoRA", "step_vs_stock_trl", 0.33),
    ("the same against the measured GEMM floor", "step_vs_floor", 1.7),
    ("the same against LitGPT LoRA, bfloat16", "step_vs_litgpt", 0.5),
    ("4 learning rates in one pass against 4 solo passes", "pass4_vs_solo4", 0.8),
    ("grid of 8 formats x 4 queries x 64 tokens against a generate loop", "grid_vs_loop", 0.25),
    ("the same against llama.cpp on the same cores", "grid_vs_llamacpp", 1.0),
    ("playground: 8 formats against the bare batched decode", "page_vs_bare", 1.5),
)
GPU_BARS = (
    ("training step at Mistral-7B's shape against stock TRL", "step_vs_stock_trl", 0.5),
    ("4 learning rates in one pass against 4 solo passes", "pass4_vs_solo4", 0.45),
    ("training step in 4 bits against stock TRL", "step_4_bits_vs_stock_trl", 0.5),
)
SIZE_BARS = {"gemma-3-270m": (0.65, 0.75), "Qwen2.5-Coder-0.5B-Instruct": (0.6, 0.7)}
"""{model: most of plain PEFT's time for a step, on a processor with AMX and on one without}."""
GIB = 2**30


def bars(results: Mapping) -> list[dict]:
    """Each bar beside what was measured: what, bar, measured and met, both None if it was not measured."""
    device, rows = results["environment"]["device"], []

    def bar(what: str, value: float | None, most: float, unit: str = "", word: str = "at most") -> None:
        measured, met = (None, None) if value is None else (f"{value:.3g}{unit}", value <= most)
        rows.append({"what": what, "bar": f"{word} {most:g}{unit}", "measured": measured, "met": met})

    for what, key, most in CPU_BARS if device == "cpu" else GPU_BARS:
        bar(what, results["ratios"].get(key), most, " x")
    sizes = results.get("sizes", {})
    for model, (with_amx, without) in SIZE_BARS.items() if device == "cpu" else ():
        measured, amx = sizes.get(model, {}), sizes.get("amx")
        bar(f"step of {model} against plain PEFT", measured.get("vs_peft"), with_amx if amx else without, " x")
        bar(f"step of {model} against its GEMM floor", measured.get("vs_floor"), 2.5 if amx else 1.4, " x")
        bar(f"first step of {model} after start", measured.get("first_step_seconds"), 40, " s")
        bar(f"4 learning rates of {model} in one pass against 4 passes", measured.get("pass4_vs_solo4"), 0.85, " x")
        bar(f"{model}: a query in 8 formats against a generate loop", measured.get("grid_vs_loop"), 0.2, " x")
    parts = ("trajectory", "step", "memory", "pass")
    trajectory, step, memory, together = (results.get(part, {}) for part in parts)
    if device == "cpu":
        bar("100 losses against PEFT, float32 adapters", trajectory.get("differ_by_at_most"), 0.02, word="within")
    if (difference := trajectory.get("in_float32_by")) is not None:
        bar("the same, both in float32", difference, 0.02, word="within")
    if (theirs := trajectory.get("bfloat16_itself_by")) is not None:
        bar("our losses' distance from float32, over PEFT's", trajectory["from_float32_by"] / theirs, 1, " x")
    bar("4 in one pass: loss against solo, relative", together.get("losses_differ_by"), 1e-3, word="within")
    if (difference := together.get("losses_differ_from_one_thread_by")) is not None:
        bar("the same, solo with one thread", difference, 1e-3, word="within")
    if device == "cpu":
        bar("first step after start", step.get("first_step_seconds", {}).get("ours"), 20, " s")
    else:
        peak = step.get("peak_bytes", {}).get("ours, 4 bits")
        bar("peak memory with 4-bit residency, activations kept", peak and peak / GIB, 8, " GiB")
        counted = results.get("launches", {}).get("4 bits", {})
        bar(
            "kernels that a step in 4 bits launches, activations kept",
            counted.get("operators", {}).get("launches"),
            4000,
        )
        correct = results.get("correctness", {})
        worst = max(correct.get("families_differ_by", {}).values(), default=None)
        bar("losses of every family against PEFT", worst, 0.02, word="within")
        bar(
            "losses of 4 adapters in one pass against alone",
            correct.get("adapters_differ_from_alone_by"),
            0.02,
            word="within",
        )
    if memory:
        bar("memory: growth from epoch 10 to 600", memory["at_the_end"] / memory["after_10_epochs"] - 1, 0.05)
    if page := results.get("page"):
        bar("playground: first paint after the kernel's start", page["painted_seconds"], 2, " s")
        bar("playground: first text after Generate", page["first_text_seconds"], 1, " s")
        bar("playground: Stop, the slowest of five", page["stopped_seconds"], 0.5, " s")
        growth = page["bytes_after_120"] / page["bytes_after_20"] - 1
        bar("playground: growth of memory over 100 generations", growth, 0.05)
    if "merge" in results:
        bar("memory of a 7B merge, extrapolated from 3 layers", results["merge"]["7B"]["measured"] / GIB, 8, " GiB")
    return rows


def check_same_machine(before: Mapping, now: Mapping, file: str) -> None:
    """Check that earlier results come from the same machine and versions, so that new ones may stand beside them.

    Parameters
    ----------
    before, now
        The earlier results; the environment now.
    file
        Where `before` was read, for the message.

    Raises
    ------
    InputError
        If a value of the environment other than the commit and the date has changed.
    """
    for key, value in now.items():
        earlier = before["environment"].get(key)
        if key not in ("commit", "recorded") and earlier != value:
            advice = "measure all parts, or --save elsewhere"
            raise InputError(f"{file}: its {key} was {earlier}, here it is {value}; {advice}")


def combine(before: Mapping, results: Mapping) -> dict:
    """`results`, and of `before` the parts that were not measured again."""
    joined = {key: before.get(key, {}) | results[key] for key in ("ratios", "measured")}
    return {**before, **results, **joined}


def table(results: Mapping) -> Table:
    """The bars and whether they were met, for a terminal."""
    machine = results["environment"]
    title = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"
    shown = Table("what", "bar", "measured", "", title=title)
    for row in bars(results):
        met = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[row["met"]]
        shown.add_row(row["what"], row["bar"], row["measured"] or "not measured", met)
    return shown


def profile_table(results: Mapping) -> Table:
    """Where the time of one of our steps goes, for a terminal."""
    profile = results["profile_ms"]
    shown = Table("work", "ms", "share", title="where a step goes")
    for kind, ms in sorted(profile.items(), key=lambda item: -item[1]):
        shown.add_row(kind, f"{ms:.1f}", f"{ms / sum(profile.values()):.0%}")
    return shown


def redraw(file: Path) -> Path:
    """Draw the picture of saved results again, beside their file; return the png.

    Raises
    ------
    InputError
        If the bench did not write the file.
    """
    results = read_object(file)
    try:
        picture(results).save(file.with_suffix(""))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not what `make bench` wrote ({type(error).__name__}: {error})") from error
    return file.with_suffix(".png")


def picture(results: Mapping) -> Picture:
    """Four panels of seconds: a step, passes with several adapters, a step by length, the grid."""
    drawn = []

    def record(panel: str, seconds: Mapping) -> list[float]:
        drawn.extend({"panel": panel, "name": name, "seconds": value} for name, value in seconds.items())
        return list(seconds.values())

    machine = results["environment"]
    with styled():
        model = SCALES["proxy"] if machine["device"] == "cpu" else "random weights in Mistral-7B's shape"
        scale = f"{model}; {machine['processor']}, {machine['cores']} cores"
        caption = "Less is better. Hatched, solid: ours. What stands in one panel was measured in turns, in one run."
        figure = titled(6.2, "Seconds: the kit and its peers", scale, caption, rates=False)
        (step, passes), (grid, lengths) = figure.subplots(2, 2)

        def across(axes, panel: str, title: str, seconds: Mapping[str, float], ours: str):
            names = sorted(seconds, key=seconds.get)
            colours = [COLOURS[1] if name == ours else GREY for name in names]
            values = record(panel, {name: seconds[name] for name in names})
            hatches = ["///" if name == ours else "" for name in names]  # seen in grey too
            axes.barh(range(len(names)), values, color=colours, height=0.6, hatch=hatches, edgecolor="white", lw=0)
            for place, value in enumerate(values):
                axes.text(value, place, f" {value:.2f}", va="center")
            axes.set(title=title, xlabel="seconds", xlim=(0, max(values) * 1.15))
            name_rows(axes, range(len(names)), ["ours, as one grid" if name == "grid" else name for name in names])

        if "step" in results:
            floor = {"its matrix products alone": results["step"]["floor_seconds"]}
            across(step, "step", "One training step, 256 tokens", results["step"]["seconds"] | floor, "ours")
        if "pass" in results:
            times = {int(k): value for k, value in results["pass"]["seconds"].items()}
            solo = {k: k * times[1] for k in times}
            for label, seconds, style, colour in (
                ("in one pass", times, "o-", COLOURS[1]),
                ("one after the other", solo, "s--", GREY),
            ):
                passes.plot(list(times), record(f"adapters, {label}", seconds), style, color=colour, label=label)
            passes.set(title="A step of several adapters", xlabel="adapters", xticks=list(times))
            passes.legend(loc="upper left")
        if "lengths" in results:
            tokens = list(map(int, results["lengths"]))
            for name, label, style, colour in (("ours", "ours", "o-", COLOURS[1]), ("TRL", "stock TRL", "s--", GREY)):
                seconds = {length: pair[name]["seconds"] for length, pair in results["lengths"].items()}
                lengths.plot(tokens, record(f"length, {name}", seconds), style, color=colour, label=label)
            lengths.set(title="A step by the length of its row", xlabel="tokens", xticks=tokens)
            lengths.legend(loc="upper left")
        if "grid" in results:
            title = f"{results['grid']['rows']} prompts, {results['grid']['tokens']} new tokens each"
            across(grid, "grid", title, results["grid"]["seconds"], "grid")
        top = 1.08 * max(axes.dataLim.y1 for axes in (passes, lengths))
        for axes in (passes, lengths):  # both are seconds of a step
            axes.set(ylim=(0, top if top > 0 else 1), ylabel="seconds")
            axes.grid(axis="y")
        for axes in figure.axes:
            axes.set_visible(axes.has_data())  # a part may not have been measured
    figure.drawn = pd.DataFrame(drawn)
    return figure
