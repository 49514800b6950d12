"""Measure speed and memory against the peers, against the machine's best rate for matrix products, and over time."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from bench import report
from mini_symposium.errors import InputError
from mini_symposium.files.writing import write_json
from mini_symposium.run import ROOT, read_object

console = Console()


def measure(only: str, json_file: str, save: str, on: str, rehearse: bool) -> None:
    """Measure some parts or all, print the table, and write what was asked for.

    Raises
    ------
    InputError
        If a part is unknown, the machine has another device, or earlier figures to be kept come from another machine.
    """
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from bench import compare
    from mini_symposium.models.devices import device

    if rehearse and on != "cuda":
        raise InputError("--rehearse: only --device cuda is rehearsed")
    if not rehearse and on not in ("", device().type):
        raise InputError(f"--device {on}: this machine has {device().type}")
    on_card = rehearse or device().type == "cuda"
    known = tuple(compare.CARD) if on_card else compare.PARTS
    parts = [part.strip() for part in only.split(",") if part.strip()] or (compare.REHEARSED if rehearse else known)
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise InputError(f"--only {', '.join(unknown)}: the parts are {', '.join(known)}")
    default = ROOT / ("runs/bench-rehearsal" if rehearse else f"figures/bench-{device().type}")
    target = Path(save) if save else None if only else default
    before = {}
    if only and target and (kept := target.with_suffix(".json")).exists():
        before = read_object(kept)
        report.check_same_machine(before, compare.machine(), str(kept))

    def show(line: str) -> None:
        console.print(line, style="dim", markup=False, soft_wrap=True)

    def keep(found: dict) -> None:
        if target:
            write_json(target.with_suffix(".json"), report.combine(before, found))

    found = compare.run_on_card(parts, rehearse, show, keep) if on_card else compare.run(parts, show)
    found = report.combine(before, found)
    found["bars"] = report.bars(found)
    if json_file:
        write_json(Path(json_file), found)
    if target:
        write_json(target.with_suffix(".json"), found)
        report.picture(found).save(target)
    console.print(report.table(found))
    if "profile_ms" in found:
        console.print(report.profile_table(found))
    for peer, why in found["missing"].items():
        console.print(f"{peer} was not measured: {why}", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", metavar="PARTS", help="parts, e.g. step,grid; all if not given")
    parser.add_argument("--json", default="", metavar="FILE", help="also write what was measured in this run there")
    parser.add_argument(
        "--save",
        default="",
        metavar="PATH",
        help="write PATH.json, .csv and .png; figures/bench-DEVICE if all parts are measured. With --only, "
        "the other parts in PATH.json are kept",
    )
    parser.add_argument("--device", default="", help="cpu, or cuda: then at Mistral-7B's shape, with random weights")
    parser.add_argument("--rehearse", action="store_true", help="what --device cuda runs, on a CPU at a tiny shape")
    parser.add_argument("--redraw", metavar="FILE.json", help="only draw the picture of a saved file again")
    options = parser.parse_args()
    try:
        if options.redraw:
            console.print(report.redraw(Path(options.redraw)), soft_wrap=True)
        else:
            measure(options.only, options.json, options.save, options.device, options.rehearse)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
