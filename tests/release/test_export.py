"""What is exported is taken by what it is for: llama.cpp itself, Axolotl's own schema, the hub's own card."""

import json
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from conftest import command
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mini_symposium.data.dataset import load_examples
from mini_symposium.data.prompt_formats import FORMATS, PromptFormat, load_preset
from mini_symposium.errors import InputError, RunError
from mini_symposium.models.base_files import Wheel, download, local_directory
from mini_symposium.models.base_models import load_tokenizer
from mini_symposium.models.merge import merge
from mini_symposium.recipe import load_recipe
from mini_symposium.release.chat_frontends import context_preset, modelfile, ollama_template, write_sillytavern
from mini_symposium.release.export import choose, gguf, ollama
from mini_symposium.release.gguf import QUANTISER, SERVER, ask, require, to_gguf
from mini_symposium.release.model_card import render_card
from mini_symposium.run import ROOT, RunDirectory

AXOLOTL = Wheel("axolotl==0.19.0", "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc", "")
CHAT = [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(("system", "user", "assistant", "user"))]


@pytest.fixture(scope="module")
def exported(proxy_checkpoint, tmp_path_factory):
    """The proxy with its adapter merged, in full and at 8 bits, and a quantised base with the adapter beside it."""
    run, folder = proxy_checkpoint.parents[2], tmp_path_factory.mktemp("exported")
    said = command("export", "gguf", run, "--type", "f32", "--type", "q8_0", "--out", folder / "merged").stdout
    beside = command("export", "gguf", run, "--lora", "--type", "q4_K_M", "--out", folder / "lora").stdout
    return folder, said, beside


def proofs(folder):
    files = json.loads((folder / "export.json").read_text())["files"]
    return {entry["kind"]: entry["proof"] for entry in files.values() if "proof" in entry}


def test_llama_cpp_answers_from_the_gguf_as_transformers_does(exported):
    folder, said, _ = exported
    found = proofs(folder / "merged")
    assert found["f32"]["prompts"] == 2 * len(FORMATS)
    assert found["f32"]["same_answers"] == found["f32"]["prompts"]
    assert found["f32"]["worst"] < 0.01
    assert found["q8_0"]["behind"] < 0.1
    assert said.count("llama.cpp against transformers: tokens of 16 prompts equal") == 2


def test_llama_cpp_answers_with_the_adapter_beside_a_quantised_base(exported, proxy_checkpoint):
    folder, _, said = exported
    assert proofs(folder / "lora")["q4_K_M"]["behind"] < 0.1
    assert {path.suffixes[-2] for path in (folder / "lora").glob("*.gguf")} == {".lora", ".q4_K_M"}
    base, lora = (next((folder / "lora").glob(f"*.{kind}.gguf")) for kind in ("q4_K_M", "lora"))
    form = FORMATS["new-query"]
    prompts = [form.render(load_examples(ROOT / "data" / "minisymposium.md")[0].query)]
    with_it, without = (ask(base, prompts, [form.stop_strings()], 32, adapter)[0].text for adapter in (lora, None))
    assert with_it != without
    assert "Q8_0" in said or "Q5_0" in said


def test_a_file_that_answers_otherwise_is_not_exported(proxy_checkpoint, tmp_path, monkeypatch):
    """A converter that swaps two matrices makes a file that loads and speaks; the check must refuse it."""
    from mini_symposium.release import export as release

    broken = tmp_path / "broken"

    def swapped(model, target, outtype, name):
        shutil.copytree(model, broken)
        tensors = load_file(broken / "model.safetensors")
        one, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (3, 4))
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        write(broken, target, outtype, name)

    write, out = release.to_gguf, tmp_path / "out"
    monkeypatch.setattr(release, "to_gguf", swapped)
    # the reference would be read from the broken file itself, so it is given the whole one
    monkeypatch.setattr(
        "mini_symposium.release.gguf.read_gguf", lambda file, names: load_file(tmp_path / "m/model.safetensors")
    )
    merge(proxy_checkpoint, "SmolLM2-135M-Instruct", tmp_path / "m", "nf4")
    with pytest.raises(RunError, match=r"nats behind, 0\.01 are allowed"):
        gguf(choose(str(tmp_path / "m")), out, ["f16"])
    assert not out.exists()


def test_a_directory_is_exported_and_what_exists_is_left_alone(tiny_checkpoint, tmp_path):
    merge(tiny_checkpoint, "tiny", tmp_path / "model")
    made = gguf(choose(str(tmp_path / "model")), tmp_path / "out", ["f16"])
    assert list(made["files"]) == ["model.f16.gguf"]
    for line, said in (
        ((tmp_path / "model", "--out", tmp_path / "out"), "is there already"),
        ((tmp_path / "model", "--out", tmp_path / "b", "--type", "q3"), "--type q3: give some of f32"),
        ((tmp_path / "model", "--out", tmp_path / "b", "--lora"), "is not a single adapter"),
        ((tmp_path / "nowhere", "--out", tmp_path / "b"), "not a run directory (recipe.yml) or a model directory (config.json)"),
    ):
        done = command("export", "gguf", *line, check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def limited(size):
    """The limit on a file's size makes a write fail halfway, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_in_an_export_leaves_nothing_behind(tiny_checkpoint, tmp_path):
    run, out = tiny_checkpoint.parents[2], tmp_path / "out"
    line = ("export", "gguf", run, "--type", "f32", "--out", out)
    merged = 2 * (local_directory("tiny") / "model.safetensors").stat().st_size  # in float32; the GGUF is a little more
    for size, whose in ((merged // 2, "cannot be written (File too large)"), (merged + 10**5, "llama.cpp's converter")):
        done = command(*line, check=False, preexec_fn=limited(size))
        assert done.returncode == 2 and whose in done.stderr and "free some space" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_in_the_quantiser_is_said(tmp_path):
    to_gguf(local_directory("tiny"), tmp_path / "whole.gguf", "f32")
    code = (
        "import sys\nfrom pathlib import Path\nfrom mini_symposium.release.gguf import quantise\n"
        "quantise(*map(Path, sys.argv[1:]), 'q8_0')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "whole.gguf", tmp_path / "q8.gguf"],
        capture_output=True,
        text=True,
        preexec_fn=limited(10**6),
    )
    assert "InputError: llama.cpp's quantiser could not write the whole file: the disk is full" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


def test_what_llama_cpp_cannot_read_is_an_error_in_a_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(RunError, match=r"llama\.cpp's server failed"):
        ask(tmp_path / "a.gguf", ["Hello"], [[]], 1)


def test_the_extra_is_pinned_and_named_when_missing():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["release"]
    assert {QUANTISER, SERVER} <= {re.split("==", line)[0] for line in extra}
    assert all("==" in line for line in extra)
    with pytest.raises(InputError, match=r"^no_such_package: not installed; `pip install -e '\.\[release\]'`"):
        require("no_such_package")


def parsed(text):
    """A Modelfile as Ollama's parser/parser.go reads it: a command, then a value that may stand in quotation marks."""
    commands, rest = [], text
    while rest := rest.lstrip("\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
        if rest.startswith('"""'):
            value, _, rest = rest[3:].partition('"""')
        else:
            value, _, rest = rest.partition("\n")
        commands.append((name, value))
    return commands


def rendered(template, messages):
    """Such templates as Go's text/template executes them: one loop over messages, one choice by role."""
    loop = re.fullmatch(
        r'{{ range .Messages }}{{ if eq .Role "user" }}(.*?){{ else if eq .Role "assistant" }}(.*?){{ else }}(.*?)'
        r"{{ end }}{{ end }}(.*)",
        template,
        re.S,
    )
    user, assistant, system, end = loop.groups()
    by_role = {"user": user, "assistant": assistant, "system": system}

    def filled(text, content):
        return re.sub(r"{{ (.*?) }}", lambda found: content if found[1] == ".Content" else found[1].strip('"'), text)

    return "".join(filled(by_role[m["role"]], m["content"]) for m in messages) + filled(end, "")


ODD = PromptFormat("odd", "{{odd}} {{user}}", "", 'a"b ')


@pytest.mark.parametrize("form", [*FORMATS.values(), ODD], ids=lambda form: form.name)
def test_a_modelfile_renders_and_stops_as_the_format_does(form):
    commands = parsed(modelfile("a.gguf", form, "b.gguf", "Ines", "Brannoch", "a note\nof two lines"))
    assert commands[:2] == [("FROM", "./a.gguf"), ("ADAPTER", "./b.gguf")]
    template = dict(commands)["TEMPLATE"]
    assert rendered(template, CHAT) == form.render_chat(CHAT, "Ines", "Brannoch")
    assert rendered(template, CHAT[1:2]) == form.render(CHAT[1]["content"], "Ines", "Brannoch")
    assert [value for name, value in commands if name == "stop"] == form.stop_strings("Ines", "Brannoch")


def test_what_a_modelfile_cannot_say_is_refused():
    with pytest.raises(InputError, match="has last_input_sequence; an Ollama template"):
        ollama_template(PromptFormat("a", "x", "", "y", last_input_sequence="z"))
    for odd in ('"""', "\x07", "\u200b"):
        with pytest.raises(InputError, match="which no Modelfile can"):
            modelfile("a.gguf", PromptFormat("a", f"x{odd}", "", "y"))


def test_ollama_gets_a_model_and_its_modelfile(tiny_checkpoint, tmp_path):
    what = choose(str(tiny_checkpoint.parents[2]), ["epoch-6"])
    ollama(what, tmp_path / "out", FORMATS["character"], "q8_0", "Ines", "Brannoch", lora=True)
    commands = dict(parsed((tmp_path / "out" / "Modelfile").read_text()))
    assert commands["FROM"].endswith("-base.q8_0.gguf") and commands["ADAPTER"].endswith(".lora.gguf")
    for key in ("FROM", "ADAPTER"):
        assert (tmp_path / "out" / commands[key]).is_file()
    assert rendered(commands["TEMPLATE"], CHAT) == FORMATS["character"].render_chat(CHAT, "Ines", "Brannoch")


def story(template, **parts):
    """The conditions and names of Handlebars, and SillyTavern's {{trim}}."""
    text = re.sub(
        r"{{#if (\w+)}}(.*?){{/if}}", lambda found: found[2] if parts.get(found[1]) else "", template, flags=re.S
    )
    text = re.sub(r"{{(\w+)}}", lambda found: parts.get(found[1], found[0]), text)
    return re.sub(r"\n*{{trim}}\n*", "", text)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_context_preset_puts_a_character_where_the_format_has_a_narrator(form):
    told = story(context_preset(form)["story_string"], system="You are Ines.", scenario="At sea.")
    messages = [{"role": "system", "content": "You are Ines.\nAt sea."}, {"role": "user", "content": "Ahoy"}]
    assert told + form.render("Ahoy") == form.render_chat(messages)


def test_sillytavern_presets_come_back_as_they_were(tmp_path):
    said = command("export", "sillytavern", "--out", tmp_path / "st").stdout.split()
    assert said[0].endswith("instruct/character.json") and said[1].endswith("context/character.json")
    for name, form in FORMATS.items():
        assert load_preset(tmp_path / "st" / "instruct" / f"{name}.json") == form
        assert json.loads((tmp_path / "st" / "context" / f"{name}.json").read_text())["name"] == name
    assert load_preset(tmp_path / "st/instruct/character.json").input_sequence == "### {{user}}"
    with pytest.raises(InputError, match="is there already"):
        write_sillytavern([FORMATS["alpaca"]], tmp_path / "st")
    with pytest.raises(InputError, match="two have the name alpaca"):
        write_sillytavern([FORMATS["alpaca"]] * 2, tmp_path / "other")


SCHEMA = """
import sys, yaml
sys.path.insert(0, sys.argv[1])
from axolotl.utils.schemas.config import AxolotlInputConfig
found = AxolotlInputConfig.model_validate(yaml.safe_load(open(sys.argv[2])))
print(found.learning_rate, found.adapter, found.datasets[0].path, found.base_model)
"""


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory):
    """Axolotl's own schema, out of its wheel: it imports what is installed here anyway."""
    folder = tmp_path_factory.mktemp("axolotl")
    with zipfile.ZipFile(download(AXOLOTL, folder)) as archive:
        archive.extractall(folder / "unpacked")

    def accepts(path):
        line = [sys.executable, "-c", SCHEMA, folder / "unpacked", path]
        return subprocess.run(line, capture_output=True, text=True)

    return accepts


@pytest.mark.parametrize("name", ["proxy", "paper"])
def test_axolotls_schema_accepts_the_recipe(axolotl, name, tmp_path):
    command("export", "axolotl", name, "--out", tmp_path / "out")
    path = tmp_path / "out" / f"{name}.yml"
    done = axolotl(path)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(name)
    base = {"proxy": "HuggingFaceTB/SmolLM2-135M-Instruct", "paper": "mistralai/Mistral-7B-v0.1"}[name]
    assert done.stdout.splitlines()[-1] == f"{recipe.learning_rate} qlora {name}.jsonl {base}"
    rows = [json.loads(line)["text"] for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert rows == [example.text for example in load_examples(recipe.dataset)]
    broken = tmp_path / "broken.yml"
    broken.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "learning_rate": "fast", "eval_steps": 3}))
    assert axolotl(broken).returncode != 0


def test_a_model_that_axolotl_does_not_have_is_refused(tmp_path):
    done = command("export", "axolotl", "tiny", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2 and "Axolotl has no such model" in done.stderr
    assert not (tmp_path / "out").exists()


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


def test_prompts_have_the_same_tokens_as_in_training(exported):
    """What the check compares is not empty: the tokens of a format's prompt are those that transformers gives."""
    file = next((exported[0] / "merged").glob("*.q8_0.gguf"))
    prompts = [form.render("Wie geht's, 你好?") for form in FORMATS.values()]
    replies = ask(file, prompts, [[]] * len(prompts), 1)
    tokenizer = load_tokenizer("SmolLM2-135M-Instruct")
    assert [reply.prompt_ids for reply in replies] == tokenizer(prompts)["input_ids"]
