"""Killed at any instant, the same command goes on, and ends where it would have ended."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHORT

from mini_symposium.files.writing import alone, discard, written_whole
from mini_symposium.run import ROOT, RunDirectory

RATES = (1e-2, 1e-3)
TRAIN = """
from mini_symposium.data.dataset import load_examples
from mini_symposium.training.finetune import train
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, find
examples = load_examples(find("data/minisymposium.md"))
recipe = load_recipe("tiny", num_epochs=5, lora_r=2, lora_dropout=0.0)
train(recipe, examples[:3], RunDirectory({run!r}), {rates}, [1, 2, 3, 4], held_out=examples[3:4])
"""


class Nursery:
    """See nursery.py."""

    def __init__(self, scratch: Path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tests" / "nursery.py")]
        self.log, pipe = scratch / "log", subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(self, code: str, below: Path, **how) -> tuple[int, int]:
        """Exit code and number of changes."""
        request = {"code": code, "log": str(self.log), "below": str(below), **how}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def train(self, run: Path, **how) -> tuple[int, int]:
        return self.run(TRAIN.format(run=str(run), rates=RATES), run, **how)


def steps(run: Path, rate: float) -> list[dict]:
    return [{**line, "seconds": 0} for line in RunDirectory(run).metrics(rate)]


def check_equal(run: Path, other: Path) -> None:
    """Every line, every bit of every adapter and of what resuming needs, and nothing besides."""
    for rate in RATES:
        ours, theirs = RunDirectory(run), RunDirectory(other)
        assert steps(run, rate) == steps(other, rate)
        assert ours.probes(rate) == theirs.probes(rate)
        assert ours.checkpoints(rate).keys() == theirs.checkpoints(rate).keys()
        for epoch, folder in theirs.checkpoints(rate).items():
            mine = ours.checkpoints(rate)[epoch]
            assert {path.name for path in mine.iterdir()} == {path.name for path in folder.iterdir()}, mine
            bits = [(each / "adapter_model.safetensors").read_bytes() for each in (mine, folder)]
            assert bits[0] == bits[1]
            if (folder / "optimizer.pt").exists():
                moments = [torch.load(each / "optimizer.pt", weights_only=True)["moments"] for each in (mine, folder)]
                for a, b in zip(*moments, strict=True):
                    assert all(torch.equal(a[key], b[key]) for key in b)
    assert leftovers(run) == []


def leftovers(run: Path) -> list[str]:
    return [str(path) for path in run.rglob(".*") if path.name not in (".lock", ".training.lock")]


def kill_until_done(nursery, run: Path, changes: int, chance: random.Random) -> int:
    """Kill at random instants until an attempt is through before its time; return the number of kills."""
    kills = 0
    while True:
        how = {"kill": chance.randint(1, changes)} if chance.random() < 0.7 else {"after": chance.uniform(0.2, 2.5)}
        code, _ = nursery.train(run, **how)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, nursery.said
        kills += 1
        for log in run.rglob("*.jsonl"):  # what a crash of the machine may leave of a line
            if chance.random() < 0.3 and log.parent.name.startswith("lr-"):
                log.open("a").write('{"step": 1')


def check_kills(nursery, whole, folder: Path, kills: int, seed: int) -> None:
    run, changes = whole
    chance, done, chains = random.Random(seed), 0, 0
    while done < kills:
        chain = folder / f"chain-{chains}"
        done += kill_until_done(nursery, chain, changes // 3, chance)
        check_equal(chain, run)
        shutil.rmtree(chain)
        chains += 1
    print(f"{done} kills in {chains} runs")


def test_a_run_killed_at_twenty_instants_equals_one_that_was_not(nursery, whole, tmp_path):
    check_kills(nursery, whole, tmp_path, 20, 1)


@pytest.mark.soak
def test_a_run_killed_at_each_of_its_changes_to_a_file_goes_on(nursery, whole, tmp_path):
    run, changes = whole
    for kill in range(1, changes + 1):
        nursery.train(tmp_path / "cut", kill=kill)
        code, _ = nursery.train(tmp_path / "cut")
        assert code == 0, nursery.said
        check_equal(tmp_path / "cut", run)
        shutil.rmtree(tmp_path / "cut")
    check_kills(nursery, whole, tmp_path, 200, int(time.time()))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


DAMAGE = {
    "a bit of the adapter": (
        lambda rate, newest: flip(newest / "adapter_model.safetensors"),
        "is not what was written",
    ),
    "the end of the moments": (lambda rate, newest: cut(newest / "optimizer.pt"), "is not what was written"),
    "no state": (lambda rate, newest: (newest / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "no checksums": (lambda rate, newest: (newest / "checksums.json").write_text("{"), "not JSON"),
    "a log cut short": (lambda rate, newest: cut(rate / "metrics.jsonl"), "whole lines of 15"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_from_a_damaged_checkpoint_it_falls_back_to_the_one_before(nursery, whole, tmp_path, kind):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    spoil, said = DAMAGE[kind]
    rate = RunDirectory(run).learning_rate_dir(RATES[1])
    spoil(rate, rate / "checkpoints" / "epoch-0005")
    code, _ = nursery.train(run)
    assert code == 0, nursery.said
    assert f"epoch-0005: damaged ({'' if kind != 'no checksums' else str(rate)}" in nursery.said
    assert said in nursery.said and "resuming from epoch 4" in nursery.said
    check_equal(run, whole[0])


def test_a_second_process_on_a_run_is_refused(nursery, tmp_path):
    impatient = "import mini_symposium.training.finetune as finetune\nfinetune.PATIENCE = 0\n"
    train = ["train", "--recipe", "tiny", "--run", str(tmp_path / "run")]
    main = f"from mini_symposium.cli.main import main\nmain({train!r})"
    for name, code in ((".lock", main), (".training.lock", impatient + main)):
        with alone(tmp_path / "run", name):
            assert nursery.run(code, tmp_path)[0] == 2
            assert "run: another process works here" in nursery.said
    assert not (tmp_path / "run" / "recipe.yml").exists()


MERGE = """
from pathlib import Path
from mini_symposium.models.merge import merge
merge(Path({checkpoint!r}), "tiny", Path({out!r}))
"""


def test_a_killed_merge_leaves_nothing_and_the_next_one_is_whole(nursery, whole, tmp_path):
    checkpoint = RunDirectory(whole[0]).checkpoints(RATES[0])[5]

    def merge(out: Path, **how):
        return nursery.run(MERGE.format(checkpoint=str(checkpoint), out=str(out)), out.parent, **how)

    code, changes = merge(tmp_path / "undisturbed" / "out")
    assert code == 0, nursery.said
    out = tmp_path / "killed" / "out"
    for kill in random.Random(2).sample(range(2, changes), 4):
        assert merge(out, kill=kill)[0] == -signal.SIGKILL
        if out.exists():  # in the moment after it got its name
            discard(out)
    assert any(out.parent.glob(".out.*.part"))
    with pytest.raises(ZeroDivisionError), written_whole(out):
        assert merge(out)[0] == 1
        assert "another process is writing it" in nursery.said
        raise ZeroDivisionError  # whoever was writing gives up
    assert merge(out)[0] == 0, nursery.said
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for path in (tmp_path / "undisturbed" / "out").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(nursery, whole, tmp_path):
    run = tmp_path / "run"
    code = TRAIN.format(run=str(run), rates=RATES)
    # Where the tests were started in the background of a shell (nohup, cron), a child ignores SIGINT.
    interruptible = (
        "import signal\nfrom mini_symposium.cli import main as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"cli.app.command('x')(lambda: exec({code!r}, {{}}))\ncli.main(['x'])"
    )
    ended, _ = nursery.run(interruptible, run, after=1.2, signal=signal.SIGINT)
    assert ended == 130, nursery.said
    assert "interrupted; finished work is kept, and the same command resumes from there" in nursery.said
    assert "Traceback" not in nursery.said
    assert leftovers(run) == []
    assert nursery.train(run)[0] == 0, nursery.said
    check_equal(run, whole[0])


@pytest.mark.soak
def test_the_real_notebooks_killed_at_random_instants_end_with_the_same_claims(tmp_path):
    """On the tiny recipe; what differs is only when something was done, and how much memory it took."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start(run):
        line = [sys.executable, "-m", "mini_symposium", "reproduce", "--recipe", "tiny", "--run", run, *SHORT]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)

    began = time.monotonic()
    _, said = start(whole).communicate()
    assert (whole / "claims.json").exists(), said
    took, chance, kills = time.monotonic() - began, random.Random(5), 0
    while True:
        process = start(cut)
        try:
            _, said = process.communicate(timeout=chance.uniform(0.1, 0.7) * took)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0 and kills > 1, said
    asked = [path for path in whole.rglob("*.json") if path.parent.name == "evaluations"]
    assert len(asked) >= 2
    for path in (whole / "claims.json", whole / "base.json", *asked):
        assert (cut / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    for rate in RunDirectory(whole).learning_rates():
        assert steps(cut, rate) == steps(whole, rate)
        for epoch, folder in RunDirectory(whole).checkpoints(rate).items():
            name = "adapter_model.safetensors"
            assert (RunDirectory(cut).checkpoints(rate)[epoch] / name).read_bytes() == (folder / name).read_bytes()
    print(f"{kills} kills")
