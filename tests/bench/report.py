"""The bench's table and picture, from what it measured."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich.table import Table

from mini_symposium.errors import InputError
from mini_symposium.figures.style import COLOURS, GREY, SCALES, Picture, name_rows, styled, titled
from mini_symposium.run import read_object

CPU_BARS = (
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
)
GIB = 2**30


def bars(found: Mapping) -> list[dict]:
    """What was to be reached, beside what was measured: what, bar, measured (None if it was not), met."""
    device = found["environment"]["device"]
    rows = [
        {"what": what, "bar": f"at most {bar:g} x", "value": found["ratios"].get(key), "most": bar, "unit": " x"}
        for what, key, bar in (CPU_BARS if device == "cpu" else GPU_BARS)
    ]
    parts = ("trajectory", "step", "memory", "pass")
    trajectory, step, memory, together = (found.get(part, {}) for part in parts)
    more = [
        ("100 losses against PEFT, float32 adapters", trajectory.get("differ_by_at_most"), 0.02, "within", ""),
        ("4 in one pass: loss against solo, relative", together.get("losses_differ_by"), 1e-3, "within", ""),
    ]
    if (exact := trajectory.get("in_float32_by")) is not None:
        more.insert(1, ("the same, both in float32", exact, 0.02, "within", ""))
    if (theirs := trajectory.get("bfloat16_itself_by")) is not None:
        own = trajectory["from_float32_by"] / theirs
        more.insert(2, ("what bfloat16 takes them from float32, over PEFT's", own, 1, "at most", " x"))
    if (exact := together.get("losses_differ_from_one_thread_by")) is not None:
        more.append(("the same, solo with one thread", exact, 1e-3, "within", ""))
    if device == "cpu":
        more.append(("first step after start", step.get("first_step_seconds", {}).get("ours"), 20, "at most", " s"))
    else:
        peak = step.get("peak_bytes", {}).get("ours, 4 bits")
        more.append(("peak memory with 4-bit residency", peak and peak / GIB, 8, "at most", " GiB"))
    if memory:
        growth = memory["at_the_end"] / memory["after_10_epochs"] - 1
        more.append(("memory, epoch 600 over epoch 10: growth", growth, 0.05, "at most", ""))
    if "page" in found:
        page = found["page"]
        growth = page["bytes_after_120"] / page["bytes_after_20"] - 1
        more += [
            ("playground: first paint after the kernel's start", page["painted_seconds"], 2, "at most", " s"),
            ("playground: first text after Generate", page["first_text_seconds"], 1, "at most", " s"),
            ("playground: Stop, the slowest of five", page["stopped_seconds"], 0.5, "at most", " s"),
            ("playground: memory over 100 generations, growth", growth, 0.05, "at most", ""),
        ]
    if "merge" in found:
        peak = found["merge"]["7B"]["measured"] / GIB
        more.append(("memory of a 7B merge, drawn out from 3 layers", peak, 8, "at most", " GiB"))
    rows += [
        {"what": what, "bar": f"{word} {most:g}{unit}", "value": value, "most": most, "unit": unit}
        for what, value, most, word, unit in more
    ]
    return [
        {
            "what": row["what"],
            "bar": row["bar"],
            "measured": None if row["value"] is None else f"{row['value']:.3g}{row['unit']}",
            "met": None if row["value"] is None else row["value"] <= row["most"],
        }
        for row in rows
    ]


def check_same_machine(before: Mapping, where: Mapping, file: str) -> None:
    """Refuse to put figures beside those of another machine, or of other versions.

    Parameters
    ----------
    before, where
        What was found earlier; the environment now.
    file
        Where `before` was found.
    """
    for key, now in where.items():
        then = before["environment"].get(key)
        if key not in ("commit", "recorded") and then != now:
            raise InputError(f"{file}: its {key} was {then}, here it is {now}; measure all parts, or --save elsewhere")


def onto(before: Mapping, found: Mapping) -> dict:
    """What was measured, and what had been measured before and was not measured again."""
    joined = {key: before.get(key, {}) | found[key] for key in ("ratios", "measured")}
    return {**before, **found, **joined}


def table(found: Mapping) -> Table:
    """The bars and whether they were met, for a terminal."""
    where = found["environment"]
    shown = Table(
        "what", "bar", "measured", "", title=f"{where['processor']}, {where['cores']} cores, {where['device']}"
    )
    for row in bars(found):
        met = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[row["met"]]
        shown.add_row(row["what"], row["bar"], row["measured"] or "not measured", met)
    return shown


def profile_table(found: Mapping) -> Table:
    """Where a step of ours goes, for a terminal."""
    spent = found["profile_ms"]
    shown = Table("work", "ms", "share", title="where a step goes")
    for kind, ms in sorted(spent.items(), key=lambda item: -item[1]):
        shown.add_row(kind, f"{ms:.1f}", f"{ms / sum(spent.values()):.0%}")
    return shown


def redraw(file: Path) -> Path:
    """Draw the picture of a saved bench again, beside it; return the png.

    Raises
    ------
    InputError
        If the file is no such thing.
    """
    found = read_object(file)
    try:
        picture(found).save(file.with_suffix(""))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not what `make bench` wrote ({type(error).__name__}: {error})") from error
    return file.with_suffix(".png")


def picture(found: Mapping) -> Picture:
    """Seconds of a step, of passes with several adapters, by length, and of the grid."""
    drawn = []

    def note(panel: str, name: str, seconds: float) -> float:
        drawn.append({"panel": panel, "name": name, "seconds": seconds})
        return seconds

    where = found["environment"]
    with styled():
        look = "Shorter is better. Everything that shares a panel took turns in one run."
        model = SCALES["proxy"] if where["device"] == "cpu" else "random weights in Mistral-7B's shape"
        scale = f"{model}; {where['processor']}"
        figure = titled(6.2, "Seconds: the kit and its peers", f"{scale}, {where['cores']} cores", look, rates=False)
        (step, passes), (lengths, grid) = figure.subplots(2, 2)

        def across(axes, panel: str, title: str, seconds: Mapping[str, float], ours: str):
            names = sorted(seconds, key=seconds.get)
            colours = [COLOURS[1] if name == ours else GREY for name in names]
            values = [note(panel, name, seconds[name]) for name in names]
            axes.barh(range(len(names)), values, color=colours, height=0.6)
            for place, value in enumerate(values):
                axes.text(value, place, f" {value:.2f}", va="center")
            axes.set(title=title, xlim=(0, max(values) * 1.15))
            name_rows(axes, range(len(names)), names)

        if "step" in found:
            floor = {"the products alone": found["step"]["floor_seconds"]}
            across(step, "step", "One training step, 256 tokens", found["step"]["seconds"] | floor, "ours")
        if "pass" in found:
            times = {int(k): value for k, value in found["pass"]["seconds"].items()}
            one = [k * times[1] for k in times]
            for style, label, values in (("o-", "in one pass", times.values()), ("s--", "one after the other", one)):
                colour = COLOURS[1] if label == "in one pass" else GREY
                each = [note(f"adapters, {label}", str(k), value) for k, value in zip(times, values, strict=True)]
                passes.plot(list(times), each, style, color=colour, label=label)
            passes.set(title="A step of several adapters", xlabel="adapters", xticks=list(times), ylim=(0, None))
            passes.legend()
        if "lengths" in found:
            for name, style, colour in (("ours", "o-", COLOURS[1]), ("TRL", "s--", GREY)):
                at = list(map(int, found["lengths"]))
                values = [each[name]["seconds"] for each in found["lengths"].values()]
                each = [note(f"length, {name}", str(tokens), v) for tokens, v in zip(at, values, strict=True)]
                lengths.plot(at, each, style, color=colour, label=name if name == "ours" else "stock TRL")
            lengths.set(title="A step by the length of its row", xlabel="tokens", xticks=at, ylim=(0, None))
            lengths.legend()
        if "grid" in found:
            title = f"{found['grid']['rows']} prompts, {found['grid']['tokens']} new tokens each"
            across(grid, "grid", title, found["grid"]["seconds"], "grid")
    figure.drawn = pd.DataFrame(drawn)
    return figure
