"""A card is read by the hub's own reader, and holds what the run found."""

import json
import re
import shutil

import pytest
import yaml
from conftest import command
from huggingface_hub import ModelCard

from mini_symposium.errors import InputError
from mini_symposium.release.model_card import render_card
from mini_symposium.run import ROOT, RunDirectory


@pytest.fixture
def published(tmp_path):
    """The committed figures of the proxy run, with a checkpoint's folder, a survival file and a ledger beside them."""
    run = RunDirectory(tmp_path / "proxy")
    shutil.copytree(ROOT / "figures" / "proxy", run.path)
    checkpoint = run.learning_rate_dir(1e-5) / "checkpoints" / "epoch-0030"
    checkpoint.mkdir(parents=True)
    row = {"storage": "bf16", "verdict": "lost", "gain": 0.01, "kl_share": 0.99, "same": 0.25, "cosine": 0.1}
    survived = {"storages": [row, {**row, "storage": "fp32", "gain": None}], "sentence": "It is lost in bf16."}
    run.survival_file(1e-5, 30).parent.mkdir()
    run.survival_file(1e-5, 30).write_text(json.dumps(survived))
    claim = {
        "id": "C1",
        "claim": "a | b",
        "metric": "ROUGE-L",
        "value": 0.123456,
        "interval": [0.1, 0.2],
        "n": 13,
        "seeds": 3,
    }
    (run.path / "claims.json").write_text(json.dumps([{**claim, "scale": "proxy", "verdict": "inconclusive"}]))
    return run, checkpoint


def test_a_card_is_what_the_hub_reads_and_holds_what_the_run_found(published, tmp_path):
    run, _ = published
    said = command("export", "card", run.path, "--out", tmp_path / "out").stdout
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert "| bf16 | lost | 0.01 | 0.99 | 0.25 | 0.10 |" in card.text and "It is lost in bf16." in card.text
    assert "| fp32 | lost | not measurable |" in card.text
    assert "| C1 | a \\| b | ROUGE-L | 0.1235 | 0.1 to 0.2 | 13 | 3 | proxy | inconclusive |" in card.text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.S)[1])
    assert recipe["lora_r"] == 16
    for image in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (tmp_path / "out" / image).is_file()
    assert "loss_curves.png" in said and f"hf upload YOU/NAME {tmp_path / 'out'}" in said
    done = command("export", "card", run.path, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2 and "is there already" in done.stderr


def test_a_card_of_an_unknown_base_asks_for_its_licence(published):
    run, checkpoint = published
    text = run.recipe_file.read_text().replace("base_model: SmolLM2-135M-Instruct", "base_model: somebody/model")
    run.recipe_file.write_text(text)
    with pytest.raises(InputError, match="--license: the licence of somebody/model is not known"):
        render_card(run, checkpoint)
    assert "license: mit" in render_card(run, checkpoint, "mit")
