import gc
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from mini_symposium.data.dataset import load_examples, tokenize
from mini_symposium.errors import InputError, RunError
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.models.devices import training_dtype
from mini_symposium.recipe import load_recipe
from mini_symposium.run import RunDirectory, find
from mini_symposium.training import checkpoints, finetune, memory_plan
from mini_symposium.training.checkpoints import ADAPTER_FILES, RESUMABLE, RESUME_FILES

DATA = find("data/minisymposium.md")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny")


@pytest.fixture(scope="module")
def examples():
    return load_examples(DATA)


@pytest.fixture(scope="module")
def trained(recipe, examples, tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("trained"))
    return run, finetune.train(recipe, examples, run, [1e-4, 1e-7])


def adapter(run, rate, epoch):
    return load_file(run.checkpoints(rate)[epoch] / "adapter_model.safetensors")


def test_adapters_move_at_1e_7_on_a_4_bit_base(trained, recipe):
    run, travels = trained
    first, last = adapter(run, 1e-7, 0), adapter(run, 1e-7, recipe.num_epochs)
    moved = torch.cat([(first[k] != last[k]).flatten() for k in first if "lora_A" in k]).float().mean()
    assert moved > 0.99
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    # Adam's first steps are a little larger than the learning rate; none may be much larger.
    assert 0.1 * travels[1].dose < travels[1].b_travel_max < 1.05 * travels[1].dose


def test_stock_trl_stands_still_and_the_proof_says_so(recipe, examples, tmp_path):
    """The very recipe through SFTTrainer as it comes: adapters in bfloat16, where a step of 1e-7 is rounded away."""
    rows = tokenize(examples, load_tokenizer("tiny"), recipe.sequence_len, completion_only=False)
    stock = SFTTrainer(
        model=load_model("tiny"),
        args=SFTConfig(
            output_dir=str(tmp_path / "stock"),
            learning_rate=1e-7,
            lr_scheduler_type="constant",
            num_train_epochs=2,
            per_device_train_batch_size=1,
            bf16=True,
            use_cpu=True,
            max_length=None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids} for row in rows]),
        processing_class=load_tokenizer("tiny"),
        peft_config=LoraConfig(r=recipe.lora_r, lora_alpha=recipe.lora_alpha, target_modules="all-linear"),
    )
    frozen = RunDirectory(tmp_path)
    checkpoints = frozen.learning_rate_dir(1e-7) / "checkpoints"
    stock.model.save_pretrained(checkpoints / "epoch-0000")
    stock.train()
    stock.model.save_pretrained(checkpoints / "epoch-0002")
    with pytest.raises(RunError, match=r"only 0\.\d+% of lora_A .* moved"):
        finetune.check_movement(frozen, 1e-7)


def test_metrics_hold_a_line_per_step_at_the_configured_rate(trained, recipe, examples):
    run, _ = trained
    for rate in (1e-4, 1e-7):
        lines = run.metrics(rate)
        assert [line["step"] for line in lines] == list(range(1, recipe.num_epochs * len(examples) + 1))
        assert {line["learning_rate"] for line in lines} == {rate}
        for epoch in range(recipe.num_epochs):
            assert sorted(line["example"] for line in lines if line["epoch"] == epoch) == list(range(len(examples)))


def test_a_lines_example_is_the_one_that_was_trained(trained, recipe, examples):
    """At 1e-7 nothing is learned, so each example keeps its loss; the named order must show it."""
    run, _ = trained
    by_example = {}
    for line in run.metrics(1e-7):
        by_example.setdefault(line["example"], []).append(line["loss"])
    within = max(max(losses) - min(losses) for losses in by_example.values())
    means = sorted(sum(losses) / len(losses) for losses in by_example.values())
    assert within < 0.2 * (means[-1] - means[0])


@pytest.mark.parametrize("fast", [True, False])
def test_held_out_texts_are_probed_and_not_learned_from(fast, recipe, examples, tmp_path):
    """What a probe measures is what PEFT and transformers measure with that checkpoint; training goes on as without."""
    learned, unseen = examples[:2], examples[2:4]
    plain, probed = RunDirectory(tmp_path / "plain"), RunDirectory(tmp_path / "probed")
    short = recipe.replace(num_epochs=3)
    finetune.train(short, learned, plain, [1e-3], fast=fast)
    finetune.train(short, learned, probed, [1e-3], fast=fast, held_out=unseen)
    kept = adapter(plain, 1e-3, 3)
    assert all(torch.equal(kept[key], value) for key, value in adapter(probed, 1e-3, 3).items())
    lines = probed.probes(1e-3)
    assert [(line["epoch"], line["example"]) for line in lines] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    model = PeftModel.from_pretrained(load_model("tiny"), probed.checkpoints(1e-3)[3]).train()
    rows = tokenize(unseen, load_tokenizer("tiny"), recipe.sequence_len, completion_only=False)
    for line, row in zip(lines[2:], rows, strict=True):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=training_dtype() == torch.bfloat16):
            output = model(input_ids=ids, labels=ids)
        right = output.logits[0, :-1].argmax(-1) == ids[0, 1:]
        assert line["loss"] == pytest.approx(output.loss.item(), abs=0.01)
        assert line["tokens"] == len(row.input_ids) - 1
        assert line["em"] == pytest.approx(right.float().mean().item(), abs=0.02)


def test_an_earlier_base_is_gone_when_the_next_is_loaded(recipe, examples, tmp_path):
    def alive():
        found = (each for each in gc.get_objects() if isinstance(each, PreTrainedModel))
        return {id(each) for each in found if not next(each.parameters()).is_meta}

    gc.collect()
    before = alive()
    finetune.train(recipe.replace(num_epochs=3), examples[:4], RunDirectory(tmp_path), [1e-3, 1e-4])
    assert alive() - before  # in a cycle of references
    model = load_model("tiny")
    assert alive() - before <= set(map(id, model.modules()))


def test_checkpoints_hold_the_adapter_and_only_the_two_newest_can_resume(trained, recipe):
    run, _ = trained
    checkpoints = run.checkpoints(1e-4)
    assert set(checkpoints) == set(recipe.checkpoint_epochs)
    for epoch, folder in checkpoints.items():
        names = {path.name for path in folder.iterdir()}
        newest = epoch in sorted(checkpoints)[-RESUMABLE:]
        assert names == ADAPTER_FILES | (RESUME_FILES if newest else set())


def test_finished_training_is_not_done_again(trained, recipe, examples):
    run, travels = trained
    before = run.checkpoints(1e-4)[recipe.num_epochs].stat().st_mtime_ns
    assert list(map(asdict, finetune.train(recipe, examples, run, [1e-4, 1e-7]))) == list(map(asdict, travels))
    assert run.checkpoints(1e-4)[recipe.num_epochs].stat().st_mtime_ns == before


def test_a_run_of_something_else_is_refused(trained, recipe, examples):
    run, _ = trained
    with pytest.raises(InputError, match="another lora_r, num_epochs"):
        finetune.train(recipe.replace(lora_r=2, num_epochs=2), examples, run, [1e-4])
    with pytest.raises(InputError, match="other examples"):
        finetune.train(recipe, examples[:5], run, [1e-4])


def cut_off_at(monkeypatch, number):
    """Ctrl-C as a checkpoint is sealed."""
    seal, sealed = checkpoints.seal, []

    def interrupted(*arguments):
        sealed.append(arguments)
        if len(sealed) == number:
            raise KeyboardInterrupt
        seal(*arguments)

    monkeypatch.setattr(checkpoints, "seal", interrupted)


def test_a_run_that_is_trained_again_goes_on_after_it_was_cut_off(recipe, examples, tmp_path, monkeypatch):
    run, short = RunDirectory(tmp_path / "run"), recipe.replace(num_epochs=4)
    how = {"learning_rates": [1e-4], "checkpoint_epochs": [1, 2, 3], "overwrite": True}

    def written(epoch):
        return (run.checkpoints(1e-4)[epoch] / "adapter_model.safetensors").stat().st_mtime_ns

    finetune.train(short, examples[:2], run, **how)
    first = written(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_off_at(patch, 3)
        finetune.train(short, examples[:2], run, **how)
    again = written(1)
    assert again > first
    finetune.train(short, examples[:2], run, **how)
    assert written(1) == again and max(run.checkpoints(1e-4)) == 4
    finetune.train(short, examples[:2], run, **how)  # it is finished, so this is another time
    assert written(1) > again


def test_a_run_that_is_refused_before_it_trained_may_be_mended(recipe, examples, tmp_path):
    base, run = tmp_path / "base", RunDirectory(tmp_path / "run")
    shutil.copytree(local_directory("tiny"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": config["hidden_size"] * 2}))
    wrong = recipe.replace(base_model=str(base), num_epochs=1)
    with pytest.raises(InputError):
        finetune.train(wrong, examples[:2], run, [1e-2])
    assert not run.recipe_file.exists() and not run.environment_file.exists()
    finetune.train(recipe.replace(num_epochs=1), examples[:2], run, [1e-2], checkpoint_epochs=[])


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_compiled_run_goes_on_compiled_though_memory_would_now_say_otherwise(
    recipe, examples, tmp_path, monkeypatch, capsys
):
    """Where less memory trains fewer adapters at a time, the steps of a pass may be too few to compile for."""
    whole, cut = (RunDirectory(tmp_path / name) for name in ("whole", "cut"))
    short, how = recipe.replace(num_epochs=3), {"learning_rates": [1e-3], "checkpoint_epochs": [1, 2]}
    monkeypatch.setattr(memory_plan, "COMPILE_FROM", 1)
    finetune.train(short, examples[:3], whole, **how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_off_at(patch, 2)
        finetune.train(short, examples[:3], cut, **how)
    monkeypatch.setattr(memory_plan, "COMPILE_FROM", 10**9)
    finetune.train(short, examples[:3], cut, **how)
    assert "resuming with the layer compiled" in capsys.readouterr().out
    assert steps(cut, 1e-3) == steps(whole, 1e-3)
    ours, theirs = adapter(cut, 1e-3, 3), adapter(whole, 1e-3, 3)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


KILLED = """
import json, sys
from mini_symposium.training.finetune import prepare, train
recipe, examples, run = prepare("tiny", sys.argv[2], sys.argv[1])
train(recipe.replace(lora_dropout=float(sys.argv[4])), examples, run, json.loads(sys.argv[3]))
"""


@pytest.fixture
def interruptible():
    """Interrupts as in a terminal: where the tests were started in the background, they are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was found
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_epoch_and_the_same_call_goes_on(trained, recipe, examples, tmp_path, interruptible):
    rows, run, seen = examples[:3], RunDirectory(tmp_path / "stopped"), []
    whole = RunDirectory(tmp_path / "whole")
    high = recipe.replace(num_epochs=5)
    finetune.train(high, rows, whole, [1e-4], [1])
    with pytest.raises(KeyboardInterrupt):
        finetune.train(
            high, rows, run, [1e-4], [1], watch=lambda epoch: seen.append(epoch) or (epoch == 1 and interruptible())
        )
    assert seen == [1, 2]  # the epoch in which it was interrupted was finished, and kept
    assert list(run.checkpoints(1e-4)) == [0, 1, 2] and run.metrics(1e-4)[-1]["step"] == 2 * len(rows)
    finetune.train(high, rows, run, [1e-4], [1])
    for epoch in (1, 5):
        first, last = adapter(run, 1e-4, epoch), adapter(whole, 1e-4, epoch)
        assert all(torch.equal(first[key], last[key]) for key in last)


def test_a_second_interrupt_does_not_wait(recipe, examples, tmp_path, interruptible, capsys):
    run = RunDirectory(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        finetune.train(recipe, examples[:3], run, [1e-4], [1], watch=lambda epoch: (interruptible(), interruptible()))
    assert list(run.checkpoints(1e-4)) == [0]
    assert "stopping at the end of this epoch; interrupt again to stop at once" in capsys.readouterr().out


def test_training_says_that_something_of_its_rows_is_not_used(recipe, examples, tmp_path, capsys):
    noted = [replace(examples[0], notes=(("a.jsonl:1", "`id` is not used"), ("a.jsonl:1", "`b` is not used")))]
    finetune.train(recipe, noted, RunDirectory(tmp_path / "run"), [1e-3], checkpoint_epochs=[3])
    assert "`id` is not used and 1 more notes; see mini-symposium inspect" in capsys.readouterr().out


def test_a_line_a_checkpoint_tells_how_it_goes(recipe, examples, tmp_path, capsys):
    run = RunDirectory(tmp_path)
    finetune.train(recipe.replace(num_epochs=2), examples[:3], run, [1e-4, 1e-5], [1], held_out=examples[3:4])
    [first, last] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    loss, probed = run.metrics(1e-5), run.probes(1e-5)
    mean = sum(line["loss"] for line in loss if line["epoch"] == 1) / 3
    assert first.startswith("epoch 1: 0.0001: loss ") and f"; 1e-05: loss {mean:.3f}, EM 0." in last
    assert last.endswith(f"held-out loss {next(line for line in probed if line['epoch'] == 2)['loss']:.3f}")


def steps(run, rate):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.metrics(rate)]


@pytest.mark.parametrize(("fast", "dropout"), [(True, 0.0), (False, 0.1)])
def test_an_answer_while_it_trains_is_the_adapters_own_and_changes_no_bit(fast, dropout, recipe, tmp_path, capsys):
    text = "### New Query\nWhat is on the roof?\n\n### Complete Response\nA cat, two slates and an old kite."
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}))
    rows = load_examples(tmp_path / "rows.jsonl") * 4
    some, rates = recipe.replace(num_epochs=40, lora_dropout=dropout), [1e-2, 1e-6]
    runs = [RunDirectory(tmp_path / name) for name in ("quiet", "asked")]
    for run, query in zip(runs, ("", "What is on the roof?"), strict=True):
        finetune.train(some, rows, run, rates, [20, 40], fast=fast, ask=query)
    told = [line for line in capsys.readouterr().out.splitlines() if " answers: " in line]
    assert "epoch 40, 1e-02 answers: A cat, two slates and an old kite." in told
    names = [line.partition(" answers: ")[0] for line in told]
    assert sorted(names) == [f"epoch {epoch}, {rate}" for epoch in (20, 40) for rate in ("1e-02", "1e-06")]
    assert not any("cat" in line for line in told if "1e-06" in line)
    for rate in rates:
        files = [run.checkpoints(rate)[40] / "adapter_model.safetensors" for run in runs]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("rates", "dropout"), [([1e-4, 1e-7], 0.0), ([1e-4], 0.1)])
def test_a_killed_run_goes_on_and_equals_one_that_was_never_killed(tmp_path, rates, dropout):
    def start(name):
        arguments = [tmp_path / name, DATA, json.dumps(rates), str(dropout)]
        return subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.PIPE, text=True)

    whole, cut = (RunDirectory(tmp_path / name) for name in ("whole", "cut"))
    process = start("whole")
    assert process.wait() == 0, process.stderr.read()
    lines = cut.learning_rate_dir(1e-4) / "metrics.jsonl"
    process = start("cut")
    while process.poll() is None and not (lines.exists() and len(lines.read_text().splitlines()) > 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process = start("cut")
    assert process.wait() == 0, process.stderr.read()

    for rate in rates:
        assert steps(cut, rate) == steps(whole, rate)
        epochs = set(whole.checkpoints(rate))
        assert set(cut.checkpoints(rate)) == epochs
        ours, theirs = adapter(cut, rate, max(epochs)), adapter(whole, rate, max(epochs))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_each_adapter_of_a_pass_ends_where_it_would_have_ended_alone(trained, recipe, examples, tmp_path):
    together, _ = trained
    for rate in (1e-4, 1e-7):
        alone = RunDirectory(tmp_path / f"{rate}")
        finetune.train(recipe, examples, alone, [rate])
        for ours, theirs in zip(steps(together, rate), steps(alone, rate), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
        first, last = adapter(alone, rate, 0), adapter(alone, rate, recipe.num_epochs)
        assert all(torch.equal(first[k], adapter(together, rate, 0)[k]) for k in first)
        travel = torch.cat([(last[k] - first[k]).flatten() for k in first])
        other = adapter(together, rate, recipe.num_epochs)
        assert torch.cosine_similarity(travel, torch.cat([(other[k] - first[k]).flatten() for k in first]), 0) > 0.99


def test_fast_and_plain_training_follow_the_same_trajectory(trained, recipe, examples, tmp_path):
    fast, _ = trained
    plain = RunDirectory(tmp_path)
    finetune.train(recipe, examples, plain, [1e-4], fast=False)
    for ours, theirs in zip(steps(fast, 1e-4), steps(plain, 1e-4), strict=True):
        assert (ours["example"], ours["tokens"]) == (theirs["example"], theirs["tokens"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)


def test_run_records_what_it_ran_on(trained, recipe):
    run, _ = trained
    found = json.loads((run.path / "environment.json").read_text())
    assert found["seed"] == recipe.seed
    assert found["packages"]["trl"]
    assert load_recipe(run.recipe_file).lora_r == recipe.lora_r
