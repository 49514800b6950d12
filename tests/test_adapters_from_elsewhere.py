"""A folder with an adapter that another trainer wrote is taken wherever a run's checkpoint is."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mini_symposium.cli.main import main
from mini_symposium.errors import InputError
from mini_symposium.models.adapters import with_base
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_model, load_tokenizer
from mini_symposium.models.generation import ask
from mini_symposium.models.merge import merge
from mini_symposium.models.predictions import compare, logits
from mini_symposium.playground.shelf import Shelf
from mini_symposium.release.export import choose, name_of
from mini_symposium.run import resolve


def trained(folder, base, **options):
    """What TRL writes: an output folder with checkpoints in it, and no adapter beside them."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    arguments = SFTConfig(
        str(folder), max_steps=10, save_steps=5, learning_rate=5e-2, report_to="none", use_cpu=True, bf16=False,
        per_device_train_batch_size=1, dataset_num_proc=None, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    rows = Dataset.from_list([{"text": "A hen lays an egg."}] * 10)
    SFTTrainer(str(base), arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config).train()
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A base in a folder of its own, and the output of TRL with plain LoRA and with rsLoRA."""
    folder = tmp_path_factory.mktemp("trl")
    base = shutil.copytree(local_directory("tiny"), folder / "base")
    return {kind: trained(folder / kind, base, use_rslora=kind == "rslora") for kind in ("lora", "rslora")} | {
        "base": base
    }


def test_the_newest_checkpoint_is_found_and_answers_on_the_base_that_it_names(elsewhere):
    found = with_base(resolve(elsewhere["lora"], "run", "adapter", "model"))
    assert (found.path, found.base) == (elsewhere["lora"] / "checkpoint-10", str(elsewhere["base"]))
    cells = ask(str(elsewhere["lora"]), "Why?", ["bare"], max_new_tokens=2)
    assert [cell["model"] for cell in cells] == ["base", "checkpoint-10"]
    assert ask(found.path, "Why?", ["bare"], max_new_tokens=2)[1]["answer"] == cells[1]["answer"]
    shelf = Shelf()
    assert "an adapter trained on" in shelf.open(str(elsewhere["lora"]))
    assert list(shelf.models) == ["base", "checkpoint-10"] and shelf.four_bit is False


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_its_merge_predicts_as_peft_does_from_base_and_adapter(elsewhere, kind, tmp_path, capsys):
    main_of("merge", str(elsewhere[kind]), "--out", str(tmp_path / "merged"))
    said = capsys.readouterr().out
    assert "onto the original base in float32" in said
    assert f"scaled by {8 / (math.sqrt(4) if kind == 'rslora' else 4):g}" in said
    base = load_model(str(elsewhere["base"]), load_in_4bit=False, dtype=torch.float32)
    live = PeftModel.from_pretrained(base, elsewhere[kind] / "checkpoint-10")
    tokenizer = load_tokenizer(str(elsewhere["base"]))
    merged = load_model(str(tmp_path / "merged"), load_in_4bit=False, dtype=torch.float32)
    with live.disable_adapter():
        before = logits(live, tokenizer, ["A hen lays"])
    wanted = logits(live, tokenizer, ["A hen lays"])
    assert (
        compare(wanted, logits(merged, tokenizer, ["A hen lays"]))["kl"] < 1e-8 < 1e-4 < compare(wanted, before)["kl"]
    )


def main_of(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def test_an_adapter_of_the_embedding_too_answers(elsewhere, tmp_path):
    base = load_model(str(elsewhere["base"]), load_in_4bit=False, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    cells = ask(str(tmp_path / "adapter"), "Why?", ["bare"], max_new_tokens=2)
    assert [cell["model"] for cell in cells] == ["base", "adapter"]


def test_a_chat_template_that_only_the_adapter_has_is_named_by_a_merge(elsewhere, tmp_path, capsys):
    adapter = shutil.copytree(elsewhere["lora"] / "checkpoint-10", tmp_path / "adapter")
    for template, named in (("", False), ("{{ messages }}", True)):
        (adapter / "chat_template.jinja").write_text(template)
        main_of("merge", str(adapter), "--out", str(tmp_path / f"merged-{named}"))
        assert ("its chat template is not the base's" in capsys.readouterr().out) == named


def test_a_release_of_it_is_named_after_its_folder(elsewhere):
    released = choose(str(elsewhere["lora"]))
    assert name_of(released) == "checkpoint-10" and released.trained_base == "original"


def test_survival_says_that_its_rows_are_not_those_of_the_training(elsewhere, capsys):
    main_of("survival", str(elsewhere["lora"]), "--storage", "fp32", "--storage", "bf16", "--rows", "1")
    said = " ".join(capsys.readouterr().out.split())
    assert "what it was trained on is not known; measured on data/minisymposium.md" in said
    assert "kept" in said


@pytest.mark.parametrize("kind", ["use_dora", "modules_to_save", "rank_pattern"])
def test_what_cannot_be_merged_exactly_is_refused_by_name(elsewhere, kind, tmp_path):
    adapter = shutil.copytree(elsewhere["lora"] / "checkpoint-10", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config[kind] = True if kind == "use_dora" else ["lm_head"] if kind == "modules_to_save" else {"q_proj": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"is LORA with {kind}; only plain LoRA can be merged"):
        merge(adapter, str(elsewhere["base"]), tmp_path / "merged")


def test_a_pickle_or_a_base_that_is_not_here_is_refused(elsewhere, tmp_path):
    adapter = shutil.copytree(elsewhere["lora"] / "checkpoint-10", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its base, /gone/base, is not here; give --base-model"):
        ask(str(adapter), "Why?")
    assert with_base(resolve(adapter, "adapter"), str(elsewhere["base"])).base == str(elsewhere["base"])
    (adapter / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="only names the file; fetch it by `git lfs pull`"):
        ask(str(adapter), "Why?")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="only safetensors are read"):
        ask(str(adapter), "Why?")


def test_llama_cpp_answers_from_its_gguf_as_transformers_does(tmp_path):
    """Real weights: an answer of a random model hangs on the last bit of a logit."""
    base = shutil.copytree(local_directory("SmolLM2-135M-Instruct"), tmp_path / "base")
    main_of("export", "gguf", str(trained(tmp_path / "trl", base)), "--type", "f32", "--out", str(tmp_path / "gguf"))
    (entry,) = (
        e for e in json.loads((tmp_path / "gguf" / "export.json").read_text())["files"].values() if "proof" in e
    )
    assert entry["proof"]["same_answers"] == entry["proof"]["prompts"] > 10 and entry["proof"]["worst"] < 0.01
