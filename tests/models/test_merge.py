import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import command
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from mini_symposium.errors import InputError
from mini_symposium.models.adapters import load_with_adapters
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.models.merge import merge
from mini_symposium.models.predictions import compare, logits

TEXTS = ["### New Query\nHow deep is a well?\n\n### Complete Response\nDrop a stone and count.", "Paris, 巴黎"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint


@pytest.mark.parametrize("base", ["nf4", "original"])
def test_a_float32_merge_predicts_as_base_and_adapter(checkpoint, tmp_path, base):
    merge(checkpoint, "tiny", tmp_path / "merged", base)
    tokenizer = load_tokenizer(str(tmp_path / "merged"))
    live = load_with_adapters("tiny", {"a": checkpoint}, base == "nf4", torch.float32)
    reference = logits(live, tokenizer, TEXTS)
    reloaded = load_model(str(tmp_path / "merged"), load_in_4bit=False, dtype=torch.float32)
    found = compare(reference, logits(reloaded, tokenizer, TEXTS))
    assert found["largest"] < 1e-5
    with live.disable_adapter():
        without = compare(reference, logits(live, tokenizer, TEXTS))
    assert without["largest"] > 1000 * found["largest"]


def test_the_two_bases_give_different_models(checkpoint, tmp_path):
    for base in ("nf4", "original"):
        merge(checkpoint, "tiny", tmp_path / base, base)
    a, b = (load_file(tmp_path / base / "model.safetensors") for base in ("nf4", "original"))
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(a[key], b[key])
    assert torch.equal(a["model.embed_tokens.weight"], b["model.embed_tokens.weight"])


def test_bfloat16_loses_a_small_delta_that_float32_keeps(checkpoint, tmp_path):
    """A delta of 1e-7 beside weights of 1e-2 is far below half a bfloat16 step."""
    small = tmp_path / "small"
    shutil.copytree(checkpoint, small)
    tensors = load_file(small / "adapter_model.safetensors")
    save_file({k: v * 1e-6 if "lora_B" in k else v for k, v in tensors.items()}, small / "adapter_model.safetensors")
    key, kept = "model.layers.0.mlp.up_proj.weight", {}
    base = load_file(local_directory("tiny") / "model.safetensors")[key].float()
    for dtype in ("float32", "bfloat16"):
        merge(small, "tiny", tmp_path / dtype, "original", dtype)
        kept[dtype] = (load_file(tmp_path / dtype / "model.safetensors")[key].float() != base).float().mean()
    assert kept["float32"] > 0.5
    assert kept["bfloat16"] < 0.01


def test_bfloat16_rounded_by_chance_keeps_the_mean_of_what_nearest_drops(tmp_path):
    from mini_symposium.models.merge import stochastic

    whole, change = torch.full((1000, 1000), 0.02).bfloat16().float(), 1e-6
    assert torch.equal((whole + change).bfloat16().float(), whole)
    rounded = stochastic(whole + change)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert (rounded - whole).mean().item() == pytest.approx(change, rel=0.05)
    assert torch.equal(stochastic(-whole), -whole)
    with pytest.raises(InputError, match="only bfloat16 is rounded by chance"):
        merge(tmp_path, "tiny", tmp_path / "out", by_chance=True)


def test_what_cannot_be_merged_is_refused_and_nothing_is_left_behind(checkpoint, tmp_path):
    out = tmp_path / "merged"
    with pytest.raises(InputError, match="the adapter is for"):
        merge(checkpoint, "SmolLM2-135M-Instruct", out)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole adapter"):
        merge(broken, "tiny", out)
    with pytest.raises(InputError, match="not a whole adapter"):
        merge(tmp_path / "nowhere", "tiny", out)
    with pytest.raises(InputError, match="base is one of"):
        merge(checkpoint, "tiny", out, base="int8")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(InputError, match="is there already"):
        merge(checkpoint, "tiny", out)
    assert [path.name for path in out.iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "merged"]


def delta(folder, key="model.layers.0.mlp.up_proj.weight"):
    base = load_file(local_directory("tiny") / "model.safetensors")[key].float()
    return load_file(folder / "model.safetensors")[key] - base


def test_several_adapters_add_the_weighted_mean_of_their_products(checkpoint, tmp_path):
    start = checkpoint.parent / "epoch-0003"
    for name, weights in {"a": {start: 1}, "b": {checkpoint: 1}, "mean": {start: 0.25, checkpoint: 0.75}}.items():
        merge(weights, "tiny", tmp_path / name)
    expected = 0.25 * delta(tmp_path / "a") + 0.75 * delta(tmp_path / "b")
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(delta(tmp_path / "mean"), expected, rtol=0, atol=1e-8)
    kept = json.loads((tmp_path / "mean" / "merge.json").read_text())["checkpoints"]
    assert [(each["checkpoint"].split("/")[-1], each["weight"]) for each in kept] == [
        ("epoch-0003", 0.25),
        ("epoch-0006", 0.75),
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_what_safetensors_reads(checkpoint, tmp_path, dtype):
    source, out = local_directory("tiny"), tmp_path / "merged"
    merge(checkpoint, "tiny", out, "original", dtype)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    untouched = "model.embed_tokens.weight"
    assert torch.equal(after[untouched], before[untouched].to(getattr(torch, dtype)))
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def random_model(folder, shards, **shape):
    """A random model in float16, and an adapter for every linear layer; the adapter's weights are random too."""
    model = MistralForCausalLM(MistralConfig(**shape)).half()
    model.save_pretrained(folder / "base", max_shard_size=shards)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    adapted.float().save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "vocab_size": 4096}
    return random_model(tmp_path_factory.mktemp("sharded"), "60MB", **shape, num_key_value_heads=8)


def test_a_sharded_merge_needs_the_memory_of_one_tensor_not_of_a_shard(sharded, tmp_path):
    """Measured in a process of its own: what is written has 590 MB in shards of 120 MB, the largest tensor 9 MB."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    little = random_model(tmp_path / "little", "1GB", **shape, num_attention_heads=4, num_key_value_heads=4)
    code = """
import sys
from pathlib import Path
import psutil
from mini_symposium.models.merge import merge
little, folder, out = map(Path, sys.argv[1:])
merge(little / "adapter", str(little / "base"), out / "small", "nf4", "float32")  # loads what torch loads at first use
held = psutil.Process().memory_info().rss
memory = merge(folder / "adapter", str(folder / "base"), out / "merged", "nf4", "float32")["memory"]
print(memory["measured"] - held, memory["predicted"] - held)
"""
    line = [sys.executable, "-c", code, little, sharded, tmp_path]
    # glibc gives every block above 32 MB back to the system when it is freed; here, the tensors are smaller than that.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    measured, predicted = map(int, done.stdout.split())
    written = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 3
    assert 0.4 * predicted < measured < 1.1 * predicted < 0.2 * written
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == pytest.approx(written, rel=1e-3)
    model = load_model(str(tmp_path / "merged"), load_in_4bit=False, dtype=torch.float32)
    live = load_with_adapters(str(sharded / "base"), {"a": sharded / "adapter"}, True, torch.float32)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, live(ids).logits, rtol=0, atol=1e-4)


def test_a_disk_that_fills_leaves_the_target_untouched(sharded, tmp_path):
    """The limit on a file's size makes a write fail halfway through, as a full disk does."""
    code = """
import resource, sys
from pathlib import Path
from mini_symposium.models.merge import merge
resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))
merge(Path(sys.argv[1]) / "adapter", sys.argv[1] + "/base", Path(sys.argv[2]) / "merged")
"""
    done = subprocess.run([sys.executable, "-c", code, sharded, tmp_path], capture_output=True, text=True)
    assert "InputError" in done.stderr and "cannot be written (File too large)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(InputError, match=r"takes 0\.0\d GB, and 0.00 GB are free"):
        merge(checkpoint, "tiny", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_base_or_adapter_is_named(checkpoint, sharded, tmp_path):
    out = tmp_path / "merged"
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    shutil.copy(checkpoint / "adapter_config.json", pickle)
    (pickle / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=r"adapter_model\.bin, a pickle"):
        merge(pickle, "tiny", out)
    unfinished = tmp_path / ".epoch-0006.x7" / "epoch-0006"
    shutil.copytree(checkpoint, unfinished)
    with pytest.raises(InputError, match="still being written"):
        merge(unfinished, "tiny", out)
    base = tmp_path / "base"
    shutil.copytree(local_directory("tiny"), base)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1000], whole[:100], b""):
        weights.write_bytes(content)
        with pytest.raises(InputError, match="not a whole safetensors file"):
            merge(checkpoint, str(base), out)
    weights.write_bytes(whole)
    renamed = tmp_path / "renamed"
    shutil.copytree(sharded / "adapter", renamed)
    with pytest.raises(InputError, match=r"the adapter is for|not in"):
        merge(renamed, "tiny", out)
    same_shape = tmp_path / "same-shape"
    shutil.copytree(checkpoint, same_shape)
    config = json.loads((same_shape / "adapter_config.json").read_text())
    for trained_on, refused in (("someone/Else-7B", True), ("/elsewhere/mini-symposium/tiny-1", False)):
        config["base_model_name_or_path"] = trained_on
        (same_shape / "adapter_config.json").write_text(json.dumps(config))
        if refused:
            with pytest.raises(InputError, match="was trained on someone/Else-7B, not on tiny"):
                merge(same_shape, "tiny", out)
        else:
            merge(same_shape, "tiny", out)
            shutil.rmtree(out)
    config["use_dora"] = True
    (same_shape / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="use_dora"):
        merge(same_shape, "tiny", out)
    assert not out.exists()


def test_nothing_from_outside_the_bases_folder_gets_into_a_merge(checkpoint, tmp_path):
    base, secret = tmp_path / "hub" / "snapshots" / "a1", tmp_path / "credentials.json"
    shutil.copytree(local_directory("tiny"), base)
    secret.write_text('{"token": "x"}')
    (base / "extra.json").symlink_to(secret)
    os.mkfifo(base / "pipe.json")
    (base / "folder.json").mkdir()
    own = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, own)
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with pytest.raises(InputError, match=r"extra\.json: leads out of"):
        merge(own, str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "hub" / "blobs").mkdir()
    secret.rename(tmp_path / "hub" / "blobs" / "c0ffee")  # as a hub's cache keeps files
    (base / "extra.json").unlink()
    (base / "extra.json").symlink_to("../../blobs/c0ffee")
    merge(own, str(base), tmp_path / "out")
    assert (tmp_path / "out" / "extra.json").read_text() == '{"token": "x"}'
    assert not (tmp_path / "out" / "pipe.json").exists() and not (tmp_path / "out" / "folder.json").exists()


def test_merge_on_the_command_line(checkpoint, tmp_path):
    run = checkpoint.parents[2]
    said = command("merge", run, "--checkpoint", "epoch-6", "--base", "nf4", "--out", tmp_path / "merged").stdout
    assert "1 x lr-1e-03/epoch-0006, scaled by 2" in said
    assert re.search(r"peak memory: [\d,]+ MiB predicted, [\d,]+ MiB measured", said)
    for arguments, expected in (
        (["--out", tmp_path / "merged"], "is there already"),
        (["--checkpoint", "epoch-99"], "epoch-99 is not there"),
        (["--base", "int8", "--out", tmp_path / "other"], "base is one of"),
    ):
        done = command("merge", run, *arguments, check=False)
        assert done.returncode == 2
        assert expected in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "other").exists()


def test_a_merge_is_whole(checkpoint, tmp_path):
    """Tokenizer, chat template, generation settings and terms come along; a tokenizer that changed is refused."""
    base = tmp_path / "tiny-1"
    shutil.copytree(local_directory("tiny"), base)
    for name, content in (
        ("chat_template.jinja", "{{ 1 }}"),
        ("GEMMA_TERMS.html", "<p>"),
        ("generation_config.json", "{}"),
    ):
        (base / name).write_text(content)
    (base / "consolidated.safetensors").write_bytes(b"not indexed")
    (base / "run.py").write_text("")
    merge(checkpoint, str(base), tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"chat_template.jinja", "GEMMA_TERMS.html", "generation_config.json", "tokenizer.json"} <= names
    assert not {"consolidated.safetensors", "run.py"} & names
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        merge(checkpoint, str(base), tmp_path / "again")
    assert not (tmp_path / "again").exists()
