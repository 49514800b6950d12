"""What breaks around a run ends it in one line, with everything kept that was good."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from test_interrupted import RATES, TRAIN, check_equal, leftovers

from mini_symposium.data.dataset import load_examples
from mini_symposium.errors import InputError
from mini_symposium.models.base_files import local_directory
from mini_symposium.recipe import load_recipe
from mini_symposium.run import ROOT, RunDirectory, find, whole_lines
from mini_symposium.training import trainer
from mini_symposium.training.finetune import as_rows
from mini_symposium.training.trainer import EpochOrder

ONE_LINE = """
import sys
from mini_symposium.cli import main as cli
{before}
cli.app.command("x")(lambda: exec({code!r}, {{}}))
cli.main(["x"])
"""


def train(nursery, run, before="", changes=""):
    """Exit code, and what the command line says in the end."""
    code = TRAIN.format(run=str(run), rates=RATES).replace("train(recipe", f"{changes}\ntrain(recipe")
    ended, _ = nursery.run(ONE_LINE.format(before=before, code=code), run)
    return ended, nursery.said.strip().splitlines()[-1]


def test_a_full_disk_is_said_and_with_space_the_same_command_goes_on(nursery, whole, tmp_path):
    """The limit on a file's size makes a write fail halfway: that of a log, of an adapter, of the moments."""
    run = tmp_path / "run"
    adapter = RunDirectory(whole[0]).checkpoints(RATES[0])[5] / "adapter_model.safetensors"
    for limit in (1000, adapter.stat().st_size // 2, adapter.stat().st_size + 1000):
        before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        code, said = train(nursery, run, before)
        assert code == 2, nursery.said
        assert "cannot be written (File too large)" in said and "free some space" in said
        assert leftovers(run) == []
    assert train(nursery, run)[0] == 0, nursery.said
    check_equal(run, whole[0])


def test_a_folder_that_cannot_be_written_is_said(nursery):
    code, said = train(nursery, "/proc/run")
    assert code == 2
    assert "/proc/run: cannot be written" in said and "choose another --run" in said


def test_when_memory_runs_out_the_knobs_are_named(nursery, tmp_path):
    """An address space that is taken away after the model is there, before the first step."""
    starve = (
        "import ctypes, resource\nfrom mini_symposium.training import finetune\n"
        "def starved(*arguments, build=finetune.check_batches):\n"
        "    build(*arguments)\n"
        "    ctypes.CDLL(None).mallopt(-3, 2**16)  # no tensor may live in what was freed before\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))\n"
        "finetune.check_batches = starved\n"
    )
    code, said = train(nursery, tmp_path / "run", starve)
    assert code == 1, nursery.said
    assert "memory ran out" in said
    for knob in ("train fewer than 2 rates in one pass (LEARNING_RATES)", "FAST=False", "gradient_checkpointing: true"):
        assert knob in said
    assert "shorten the longest example" in said


def test_a_loss_that_is_no_number_ends_the_run_at_its_example_and_the_good_checkpoint_stays(
    nursery,
    tmp_path,
):
    """A base with no number where a token lies that only one of the examples has."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(local_directory("tiny"), base)
    recipe, examples = load_recipe("tiny", base_model=str(base)), load_examples(find("data/minisymposium.md"))[:3]
    rows = [set(row.input_ids) for row in as_rows(recipe, examples)]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][min(rows[1] - rows[0] - rows[2])] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for _ in range(2):  # and once more, for it is refused in the same place
        code, said = train(nursery, run, changes=f"recipe = recipe.replace(base_model={str(base)!r})")
        assert code == 1, nursery.said
        assert f"the loss of {examples[1].source} is nan" in said
        assert "the newest checkpoint is from before this step" in said
    place = EpochOrder(3, [recipe.seed]).order(0).index(1)
    for rate in RATES:
        lines = whole_lines(RunDirectory(run).learning_rate_dir(rate) / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, place + 1))
        [kept] = RunDirectory(run).checkpoints(rate).values()
        assert all(tensor.isfinite().all() for tensor in load_file(kept / "adapter_model.safetensors").values())


@pytest.mark.parametrize("missing", [1, 2])
def test_a_cache_with_half_a_download_is_not_taken_for_a_model(tmp_path, monkeypatch, missing):
    """As the hub's client leaves it: a snapshot without some of its shards, and no network."""
    source = local_directory("tiny")
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    shards = {f"w{n}": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in list(shards.values())[missing:]:
        shutil.copy(source / "model.safetensors", snapshot / name)
    code = (
        "import sys\nfrom mini_symposium.models.base_files import local_directory\n"
        "from mini_symposium.errors import InputError\n"
        "try: local_directory('a/b')\nexcept InputError as error: sys.exit(str(error))"
    )
    import subprocess
    import sys

    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (
        "model-00001-of-00003.safetensors" in done.stderr and "is not in it; copy or download it again" in done.stderr
    )


def test_memory_that_runs_out_while_answering_is_said_in_one_line():
    code = (
        "import resource, sys, peft, torch, mini_symposium.models.generation\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, resource.RLIM_INFINITY))\n"
        "from mini_symposium.cli.main import main\n"
        "main(['ask', 'proxy', 'Why?'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert "mini-symposium: memory ran out" in done.stderr and "Traceback" not in done.stderr


def test_a_first_checkpoint_that_is_cut_short_is_named_when_movement_is_proved(nursery, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    os.truncate(RunDirectory(run).checkpoints(RATES[0])[0] / "adapter_model.safetensors", 100)
    code, said = train(nursery, run)
    assert code == 1 and "epoch-0000/adapter_model.safetensors: cannot be read" in said, nursery.said


def test_moments_that_would_have_to_be_executed_are_not(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"optimizer\.pt: not what this kit wrote"):
        trainer._load(tmp_path / "optimizer.pt")
