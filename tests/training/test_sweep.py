"""The sweep on the tiny recipe: plumbing. What it finds out on real weights is in figures/."""

import json
import re
from statistics import mean

import pytest
from conftest import command

from mini_symposium.claims.evidence import load_evidence
from mini_symposium.data.dataset import load_examples
from mini_symposium.data.held_out import load_held_out
from mini_symposium.data.prompt_formats import FORMATS
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, find
from mini_symposium.training import sweep as module
from mini_symposium.training.checkpoints import finished
from mini_symposium.training.sweep import BASE, Sweep, plan


def test_the_plan_holds_dose_step_size_and_peak_apart():
    recipe = load_recipe("proxy")
    passes = plan(recipe, high=2e-5)
    by_name = {training.name: training for group in passes for training in group}
    high, low, constant = by_name["high"], by_name["low"], by_name["constant"]
    assert high.learning_rate == pytest.approx(2e-5) and low.learning_rate == pytest.approx(2e-6)
    assert constant.learning_rate == recipe.contrast[0] == plan(recipe)[0][0].learning_rate
    assert {by_name[f"literal-{rate}"].learning_rate for rate in ("1e-06", "1e-07")} == {1e-6, 1e-7}
    scale = {name: t.lora_alpha / t.lora_r for name, t in by_name.items() if name.startswith("rank")}
    assert scale["rank-4-alpha-8"] == scale["rank-64-alpha-128"] == 2
    assert scale["rank-4-alpha-32"] * 4 == scale["rank-64-alpha-32"] * 64
    # The area below a cosine or a line from peak to nothing is half of the rectangle.
    assert by_name["cosine-dose"].learning_rate == by_name["linear-dose"].learning_rate == 2 * constant.learning_rate
    assert all(len({training.num_epochs for training in group}) == 1 for group in passes)
    seeds = {name: {t.seed for group in passes for t in group if t.name == name} for name in by_name}
    alone = {"literal-1e-06", "literal-1e-07", "rank-4-alpha-32", "rank-64-alpha-32"}
    assert {name for name in by_name if len(seeds[name]) < 3} == alone


def test_what_was_gathered_earlier_is_not_planned_again(tmp_path):
    recipe = load_recipe("proxy")
    whole = Sweep(recipe, tmp_path / "sweep", (1, 2))
    everything = whole.planned(13)
    of_low = everything[everything["experiment"] == "low"].iloc[0]
    assert (of_low["seeds"], of_low["steps"], of_low["evaluated"]) == ("1, 2", 2 * 420 * 13, (420,))
    crossed = everything[everything["experiment"] == "curve"].iloc[0]
    assert (crossed["seeds"], crossed["steps"]) == ("1, 2", 2 * 2 * 120 * 4 * 9)
    rest = Sweep(recipe, tmp_path / "sweep", (1, 2), had={("low", 1), ("curve", 2), BASE})
    left = rest.planned(13).set_index("experiment")["seeds"]
    assert left["low"] == "2" and left["curve"] == "1" and left["high"] == "1, 2"


NAMES = "high", "low", "rank-2-alpha-4", "curve"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Both rates, one seed, four examples, a few epochs; evaluated on two prompts."""
    patch = pytest.MonkeyPatch()
    shorter = {"EPOCHS_LOW": 40, "EPOCHS_HIGH": 6, "EPOCHS_CURVE": 3, "EPOCHS_COMPARED": 2, "LITERAL": ()}
    shorter |= {"RANKS": ((2, 4),), "EQUAL_ALPHA": ()}
    for name, value in (shorter | {"EVALUATED": {"high": (4, 6), "low": (40,)}}).items():
        patch.setattr(module, name, value)
    recipe = load_recipe("tiny", learning_rate=1e-4)
    whole = Sweep(recipe, tmp_path_factory.mktemp("sweep") / "tiny", (1,))
    examples, twins = load_examples(find("data/minisymposium.md"))[5:9], load_examples(find("data/twins.md"))[5:7]
    said = []
    whole.run(examples, twins, NAMES, said.append)
    adapters = whole.evaluated()
    files = [whole.root / "base.json", *map(RunDirectory.evaluation_file, adapters.values())]
    prompts = [prompt for prompt in load_held_out(split="dev") if prompt.category in ("code", "explanation")][::2]
    options = {"formats": [FORMATS["new-query"], FORMATS["alpaca"]], "max_new_tokens": 8, "posix_queries": 1}
    measured = []
    for _ in range(2):
        whole.measure(examples, twins, prompts, show=measured.append, probes=["prompt"], **options)
    yield whole, said, measured, files
    patch.undo()


def test_every_experiment_is_trained_in_a_run_of_its_own_and_only_once(small):
    whole, said, *_ = small
    assert [t.run.name for t in whole.trainings if finished(t)] == [
        "high-seed-1",
        "low-seed-1",
        "rank-2-alpha-4-seed-1",
    ]
    assert said[0] == "passes 3, adapters 3, adapter steps 192"
    one = r"pass 1 is done: high \(seed 1\); 168 adapter steps ahead, [\d.e-]+ s each, about \d+ minutes"
    assert re.fullmatch(one, said[1]) and "; 0 adapter steps ahead" in said[3]
    assert sorted(path.name for path in whole.root.iterdir() if path.is_dir()) == [
        "curve-seed-1",
        "high-seed-1",
        "low-seed-1",
        "rank-2-alpha-4-seed-1",
    ]
    again = []
    examples, twins = load_examples(find("data/minisymposium.md"))[5:9], load_examples(find("data/twins.md"))[5:7]
    whole.run(examples, twins, NAMES, again.append)
    assert len(again) == 1 and "experiments are finished" in again[0]
    kept = load_recipe(whole.root / "rank-2-alpha-4-seed-1" / "recipe.yml")
    assert (kept.lora_r, kept.lora_alpha, kept.num_epochs, kept.seed) == (2, 4, 2, 1)


def test_too_few_rows_for_held_out_curves_cost_no_sweep(tmp_path):
    whole, said = Sweep(load_recipe("tiny"), tmp_path / "tiny", (1,), passes=None), []
    whole.passes = []
    whole.run(load_examples(find("data/minisymposium.md"))[:3], (), (), said.append)
    assert said[0] == "no held-out curves: they take 4 rows or more" and "experiments are finished" in said[1]


def test_what_is_measured_is_measured_once_until_the_settings_change(small):
    _, _, measured, files = small
    assert sorted(measured) == sorted(map(str, files))
    found = json.loads(next(file for file in files if file.name == "epoch-0006.json").read_text())
    assert {line["format"] for line in found["answers"]} == {"new-query", "alpaca"}
    assert {line["id"] for line in found["roles"]} < {line["id"] for line in found["answers"]}
    assert len(found["recitation"]) == 4 and len(found["twins"]) == 2
    assert len(found["posix"]) == 1 and all(0 <= mass <= 1 for mass in found["han_mass"].values())


def test_the_ledger_reads_the_sweep(small):
    whole, *_ = small
    found = load_evidence(whole.root)
    high, low = found.named("high")[0], found.named("low")[0]
    assert (high.epochs, low.epochs, high.steps_per_epoch) == (6, 40, 4)
    assert set(high.evaluations) == {4, 6} and set(low.evaluations) == {40}
    assert set(low.twins) == {0, 10, 20, 30, 40} and set(high.twins) == set(range(7))
    assert [(each["seed"], each["learning_rate"], len(each["loss"])) for each in found.curves] == [
        (1, rate, 1 + 3) for rate in (1e-3, 1e-4)
    ]
    assert mean(high.loss[-1]) < mean(high.loss[0])
    assert "C12" in command("claims", whole.root).stdout
    rows = {row["id"]: row for row in json.loads((whole.root / "claims.json").read_text())}
    assert "the epoch at which the high rate of seed 1 recites" in rows["C2"]["needs"]
