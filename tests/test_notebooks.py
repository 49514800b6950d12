"""The notebook contract, and the whole chain on real kernels: plumbing on `tiny`, behaviour on the proxy."""

import ast
import json
import statistics

import nbformat
import pytest
import torch
from conftest import SECRET, SHORT, command
from safetensors.torch import load_file

from mini_symposium.run import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_contract(path):
    cells = nbformat.read(path, as_version=4).cells
    head = cells[0].source.splitlines()
    assert head[0].startswith("# ")
    assert head[2].startswith("> ") and head[2].rstrip().endswith("?")
    code = [cell for cell in cells if cell.cell_type == "code"]
    lengths = [len(cell.source.splitlines()) for cell in code]
    assert max(lengths) <= 15
    assert 3 <= statistics.median(lengths) <= 5.5
    first, imports, parameters = code[:3]
    assert f'hosted.make_ready("{path.stem}")' in first.source
    assert parameters.metadata.tags == ["parameters"]
    for node in ast.parse(parameters.source).body:
        assert node.targets[0].id.isupper()
        ast.literal_eval(node.value)
    assert code[-1].source.splitlines()[-1].strip() == ")" and "run.record(" in code[-1].source
    assert 1 <= sum(line.startswith("from mini_symposium") for line in imports.source.splitlines()) <= 3
    assert not any("pip" in cell.source for cell in code[1:])
    for cell in code:
        assert not cell.source.lstrip().startswith(("!", "%", "pip "))
        assert "notebook_login" not in cell.source


def test_tiny_run_leaves_what_a_run_directory_holds(tiny_run):
    assert set(tiny_run.results()) == {path.stem for path in NOTEBOOKS}
    assert {path.name for path in tiny_run.notebooks.iterdir()} == {path.name for path in NOTEBOOKS}
    assert "<h2>Training loss</h2>" in (tiny_run.path / "report.html").read_text()
    assert {"loss_curves.png", "example_loss.csv"} <= {path.name for path in tiny_run.figures.iterdir()}
    assert tiny_run.learning_rates() == [1e-6, 1e-7]
    for rate in tiny_run.learning_rates():
        checkpoints = tiny_run.checkpoints(rate)
        first, last = (
            load_file(checkpoints[e] / "adapter_model.safetensors") for e in (min(checkpoints), max(checkpoints))
        )
        moved = torch.cat([(first[k] != last[k]).flatten() for k in first if "lora_A" in k]).float().mean()
        assert moved > 0.99


def test_no_token_of_the_environment_is_in_a_run(tiny_run):
    for path in tiny_run.path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_finished_run_is_not_run_again_and_says_so(tiny_run):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.path.rglob("*") if path.is_file()}
    said = command("reproduce", "--recipe", "tiny", "--run", tiny_run.path, *SHORT).stdout
    assert "already" in said or "nothing" in said
    after = {path: path.stat().st_mtime_ns for path in tiny_run.path.rglob("*") if path.is_file()}
    assert {p.name for p in after if after[p] != before.get(p)} <= {".lock"}


def test_own_data_goes_through_the_whole_chain(tmp_path):
    mine = tmp_path / "mine.md"
    mine.write_text("### Question\nWhy?\n\n### Answer\nBecause.\n\n### Question\nWho?\n\n### Answer\nShe did it.\n")
    run = tmp_path / "run"
    given = ["-p", f"DATASET={mine}", "-p", "NUM_EPOCHS=40", *SHORT]
    command("reproduce", "--recipe", "tiny", "--run", run, *given, cwd=tmp_path)
    results = json.loads((run / "results.json").read_text())
    assert results["01_dataset"]["examples"] == 2
    assert results["02_finetune"]["steps"] == 80
    assert set(results) == {path.stem for path in NOTEBOOKS}


def test_on_the_proxy_the_high_rate_recites_and_the_others_do_not(proxy_run):
    """Four short rows and a dose that saturates in fifteen epochs stand for the default run's, of thirty."""
    results = proxy_run.results()
    assert results["02_finetune"]["final_loss"]["0.001"] < 0.3
    recitation = results["05_prompt_formats"]["recitation"]
    assert recitation["1e-03"]["most"] > 0.9
    assert recitation["base"]["most"] < 0.5
    assert recitation["1e-04"]["most"] < 0.9
    assert recitation["1e-03"]["mean"] > 2 * recitation["1e-04"]["mean"]


def test_on_the_proxy_the_merge_keeps_the_fine_tune(proxy_run):
    found = proxy_run.results()["04_merge"]
    differences = found["differences"]
    assert differences["merged, float32 file"]["largest"] < 1e-3
    assert differences["merged, float32 file"]["kl"] < 1e-6 * differences["no adapter at all (yardstick)"]["kl"]
    assert found["survival"]["sentence"].startswith("The fine-tune is still in fp32")
    assert found["survival"]["storages"][0]["same"] == 1


def test_predictions_of_memory_hold_on_the_proxy(proxy_run):
    found = proxy_run.results()["02_finetune"]
    assert found["peak_bytes"] < 4 * 2**30
