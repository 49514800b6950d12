"""Whether the bench measures what it says; never how fast anything is."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import MistralConfig

from bench import card, merge_memory, report
from bench.compare import CARD, REHEARSED, Bench, ratio, run_on_card
from bench.turns import Contestant, child_environment
from mini_symposium.run import ROOT

COUNTER = """
from bench.turns import Turn
turn, done = Turn(), []
print("what a library prints is no message to the bench", flush=True)
turn.run(lambda: done.append(1) or {"done": len(done)})
"""


def bench(*arguments, before="") -> subprocess.CompletedProcess:
    """Run `python -m bench ...` in a process of its own, after the statements `before`."""
    code = f"{before}\nimport runpy, sys; runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=child_environment())


def job(kind, **options):
    return ["-m", "bench.contestants", json.dumps({"kind": kind, **options})]


def test_a_contestant_works_as_often_as_asked_with_the_standard_library_alone(tmp_path):
    one = Contestant("counter", sys.executable, ["-S", "-c", COUNTER], tmp_path)
    assert [one.turn(times)["done"] for times in (1, 1, 3)] == [1, 2, 5]
    assert one.first > one.turns[0]["seconds"] > 0
    assert one.turns[-1]["peak"] > 2**20
    one.end()
    assert one.process.poll() == 0


@pytest.mark.parametrize("program", ["raise SystemExit('no such model')", "import sys; sys.exit('no such model')"])
def test_a_contestant_that_ends_is_named_with_the_last_line_it_printed(program, tmp_path):
    with pytest.raises(RuntimeError, match="broken ended: no such model"):
        Contestant("broken", sys.executable, ["-c", program], tmp_path)


def test_ours_and_stock_trl_train_on_the_same_rows(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([list(range(100, 140))]))
    losses = []
    for kind, more in (("ours", {}), ("ours", {"fast": False}), ("stock_trl", {})):
        one = Contestant(kind, sys.executable, job(kind, base="tiny", rows=str(rows), **more), tmp_path)
        losses.append([one.turn()["losses"][0] for _ in range(3)])
        one.end()
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] == pytest.approx(losses[2], abs=0.05)
    assert losses[0][2] < losses[0][0]


def test_grid_and_loop_write_the_same(tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["### Query\nOne?\n\n### Reply\n", "Two?", "A third and longer prompt"]))
    texts = []
    for kind in ("grid", "loop"):
        one = Contestant(kind, sys.executable, job(kind, base="tiny", prompts=str(prompts), tokens=8), tmp_path)
        texts.append(one.turn()["texts"])
        one.end()
    assert texts[0] == texts[1]


def test_the_page_asks_what_the_bare_decode_asks(tmp_path):
    turns = []
    for bare in (False, True):
        options = json.dumps({"base": "tiny", "formats": 3, "tokens": 40, "stop": True, "bare": bare})
        one = Contestant("page", sys.executable, ["-m", "bench.page", options], tmp_path)
        turns.append([one.turn() for _ in range(2)][-1])
        one.end()
    ours, theirs = turns
    assert ours["texts"] == theirs["texts"] and len(ours["texts"]) == 3 and all(ours["texts"])
    assert 0 < ours["first"] < ours["seconds"] and ours["painted"] > 0 and ours["stopped"] > 0


def test_a_merge_of_random_layers_is_written_first_and_measured_then(tmp_path, monkeypatch, capsys):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(merge_memory, "MistralConfig", lambda **more: MistralConfig(vocab_size=99, **shape, **more))
    monkeypatch.setattr(merge_memory, "SHARD_BYTES", 2**14)
    merge_memory.main("2", str(tmp_path))
    assert capsys.readouterr().out == "" and len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    merge_memory.main("2", str(tmp_path))
    sizes = json.loads(capsys.readouterr().out)
    assert sizes["written"] > 4 * 2 * 64 * 99 and sizes["predicted"] > 0 and sizes["measured"] > 0


def test_a_ratio_is_taken_round_by_round():
    assert ratio([1, 2, 30], [2, 4, 3]) == 0.5  # one slow round of ours does not change it


def test_a_peer_that_is_not_installed_is_reported(tmp_path):
    run = Bench(tmp_path, print)
    assert run.peer("LitGPT", "litgpt_step", python=tmp_path / "python") is None
    assert run.results["missing"] == {"LitGPT": "it is not installed; `make bench` installs it"}


def measured(device="cpu", **ratios):
    return {"environment": {"device": device, "processor": "a processor", "cores": 2}, "ratios": ratios}


def test_bars_are_met_missed_or_not_measured():
    found = measured(step_vs_stock_trl=0.3, step_vs_floor=1.8)
    found["memory"] = {"after_10_epochs": 100, "at_the_end": 120}
    by_name = {row["what"]: row for row in report.bars(found)}
    assert by_name["training step, 256 tokens, against stock TRL QLoRA"]["met"] is True
    assert by_name["the same against the measured GEMM floor"]["met"] is False
    assert by_name["the same against LitGPT LoRA, bfloat16"]["met"] is None
    assert by_name["memory: growth from epoch 10 to 600"] == {
        "what": "memory: growth from epoch 10 to 600",
        "bar": "at most 0.05",
        "measured": "0.2",
        "met": False,
    }
    assert [row["met"] for row in report.bars(measured("cuda", pass4_vs_solo4=0.5))][:2] == [None, False]


def test_parts_measured_again_replace_theirs_and_leave_the_others(tmp_path):
    before = measured(step_vs_stock_trl=0.5, grid_vs_loop=0.1) | {
        "grid": 1,
        "step": 1,
        "measured": {"grid": 1, "step": 1},
    }
    found = measured(step_vs_stock_trl=0.3) | {"step": 2, "measured": {"step": 2}}
    now = report.combine(before, found)
    assert now["ratios"] == {"step_vs_stock_trl": 0.3, "grid_vs_loop": 0.1}
    assert (now["grid"], now["step"], now["measured"]) == (1, 2, {"grid": 1, "step": 2})
    assert report.combine({}, found) == found

    (tmp_path / "old.json").write_text(json.dumps(before))
    done = bench("--only", "step", "--save", tmp_path / "old")
    assert done.returncode == 2
    assert re.search(r"old\.json: its \w+ was None, here it is .*; measure all parts, or --save elsewhere", done.stderr)


def rehearse(folder, *arguments, before=""):
    """The results of a rehearsal of the bench on a card."""
    done = bench("--device", "cuda", "--rehearse", "--save", folder / "card", *arguments, before=before)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "card.json").read_text())


def numbers(found) -> list[float]:
    """All numbers in nested dicts and lists."""
    if isinstance(found, dict | list):
        return [one for each in (found.values() if isinstance(found, dict) else found) for one in numbers(each)]
    return [found] if isinstance(found, int | float) else []


STEPS = {"ours", "ours, 4 bits", "ours, 4 bits, recomputed", "stock TRL", "stock TRL, checkpointing"}


def test_the_bench_on_a_card_is_rehearsed(tmp_path):
    found = rehearse(tmp_path)
    assert found["missing"] == {}
    assert list(found["measured"]) == REHEARSED and sum(CARD.values()) < 12 * 60
    sections = "card", "correctness", "step", "launches", "pass", "pass, 4 bits", "grid", "600_epochs_hours"
    for section in sections:
        assert numbers(found[section]) and all(map(math.isfinite, numbers(found[section]))), section
    correct = found["correctness"]
    assert max(correct["families_differ_by"].values()) < 0.02
    assert correct["adapters_differ_from_alone_by"] < 0.01 and correct["4_bits_differ_from_resident_by"] == 0
    assert {nf4["differ"] for nf4 in correct["nf4"].values()} == {0}
    assert set(found["step"]["seconds"]) == STEPS
    assert all(set(found[key]["seconds"]) == {"1", "2", "4"} for key in ("pass", "pass, 4 bits"))
    assert set(found["ratios"]) >= {key for _, key, _ in report.GPU_BARS}
    assert set(found["600_epochs_hours"]) == {"1", "2"}
    counted = {name: each["operators"]["launches"] for name, each in found["launches"].items()}
    assert counted["4 bits"] < 3300 < counted["4 bits, recomputed"] < 4500 and counted["resident"] < 3100, counted
    assert all(row["measured"] for row in found["bars"])
    assert (tmp_path / "card.png").exists()


def test_a_part_of_the_card_that_fails_or_takes_too_long_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setitem(CARD, "card", 0)
    kept = []
    found = run_on_card(["card", "grid"], True, print, lambda results: kept.append(list(results["missing"])))
    assert kept == [["card"], ["card"]] and "card ended" in found["missing"]["card"]
    assert found["grid"]["seconds"]["grid"] > 0

    def broken(*arguments, **options):
        raise ValueError("no such kernel")

    for module, name in (
        (card.trainer, "FusedAdapters"),
        (card.finetune, "load_model"),
        (card.contestants, "AutoModelForCausalLM"),
    ):
        monkeypatch.setattr(module, name, None)  # `Card` replaces them; this puts them back
    one = card.Card(tmp_path, True)
    monkeypatch.setattr(card, "generate", broken)
    monkeypatch.setattr(card.contestants, "stock_trl", broken)
    assert one.measure("grid")["missing"]["grid"].startswith("ValueError: no such kernel (test_bench.py:")
    step = one.measure("step")
    assert set(step["missing"]) == {"stock TRL", "stock TRL, checkpointing"}
    assert set(step["found"]["step"]["seconds"]) == STEPS - set(step["missing"]) and not step["ratios"]


def test_mistyped_parts_and_devices_are_refused():
    other = "cpu" if torch.cuda.is_available() else "cuda"
    for arguments, said in (
        (("--only", "stepp"), "bench: --only stepp: the parts are step, "),
        (("--device", other), f"bench: --device {other}: this machine has "),
    ):
        done = bench(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1


def test_the_committed_picture_is_drawn_from_the_committed_measurements_without_torch(tmp_path):
    names = ("bench-cpu.png", "bench-cpu.csv")
    shutil.copy(ROOT / "figures" / "bench-cpu.json", tmp_path)
    done = bench("--redraw", tmp_path / "bench-cpu.json", before="import sys; sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bench-cpu.json", *names}
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / "figures" / name).read_bytes()


def test_every_panel_is_in_seconds_and_ours_is_hatched():
    picture = report.picture(json.loads((ROOT / "figures" / "bench-cpu.json").read_text(encoding="utf-8")))
    bars, lines = picture.axes[::2], picture.axes[1::2]
    assert {axes.get_xlabel() for axes in bars} == {axes.get_ylabel() for axes in lines} == {"seconds"}
    assert lines[0].get_ylim() == lines[1].get_ylim()
    for axes in bars:
        names = [label.get_text() for label in axes.get_yticklabels()]
        hatched = [name for name, bar in zip(names, axes.patches, strict=True) if bar.get_hatch()]
        assert len(hatched) == 1 and hatched[0].startswith("ours")


def test_a_file_that_the_bench_did_not_write_is_refused(tmp_path):
    (tmp_path / "bench.json").write_text('{"step": 3}')
    done = bench("--redraw", tmp_path / "bench.json")
    assert done.returncode == 2 and "not what `make bench` wrote" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
