from collections import Counter

import pytest
import yaml

from mini_symposium.errors import InputError
from mini_symposium.recipe import KEYS, SHIPPED, load_recipe
from mini_symposium.run import ROOT

RECIPES = ROOT / "mini_symposium" / "recipes"
GOOD = """\
base_model: tiny
datasets:
  - {path: data/minisymposium.jsonl, type: completion}
sequence_len: 512
lora_r: 4
lora_alpha: 8
learning_rate: 1e-7
num_epochs: 3
"""


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "mine.yml"
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        return path

    return written


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_any_yaml_reader_gets_its_numbers(file):
    recipe = load_recipe(file)
    plain = yaml.safe_load(file.read_text())
    assert {key: getattr(recipe, key) for key in plain} == plain
    assert isinstance(plain["learning_rate"], float)
    assert recipe.lora_alpha == 2 * recipe.lora_r
    assert recipe.lr_scheduler == "constant"
    assert recipe.val_set_size == 0 and not recipe.sample_packing and recipe.micro_batch_size == 1


def test_the_demo_recipe_holds_the_cards_words():
    paper = load_recipe("paper")
    assert paper.base_model == "mistralai/Mistral-7B-v0.1"
    assert (paper.learning_rate, paper.num_epochs, paper.load_in_4bit) == (1e-7, 600, True)
    assert paper.contrast == (1e-6, 1e-7)
    demo = (RECIPES / SHIPPED["paper"]).read_text()
    values = [line for line in demo.splitlines() if line[:1].isalpha() and ":" in line]
    uncommented = [line for line in values if "#" not in line and not line.startswith(("datasets", "output_dir"))]
    assert uncommented == ["adapter: qlora", "load_in_4bit: true"]


def test_the_control_for_dose_is_always_kept():
    for name in SHIPPED:
        recipe = load_recipe(name)
        assert {0, recipe.num_epochs // 10, recipe.num_epochs} <= set(recipe.checkpoint_epochs)


@pytest.mark.parametrize("rate", ["1e-7", "0.0000001", "1.0e-7", "'1e-7'"])
def test_a_rate_is_a_number_however_yaml_reads_it(write, rate):
    assert load_recipe(write(GOOD.replace("1e-7", rate))).learning_rate == 1e-7


@pytest.mark.parametrize("name", SHIPPED)
def test_a_written_recipe_loads_back_equal(write, name):
    recipe = load_recipe(name, learning_rate=2.5e-6, seed=7)
    assert load_recipe(write(recipe.to_yaml())) == recipe
    assert set(yaml.safe_load(recipe.to_yaml())) == set(KEYS)


@pytest.mark.parametrize(
    "change, expected",
    [
        (GOOD + "lora_rank: 4\n", r"mine\.yml:9: unknown key 'lora_rank'; did you mean 'lora_r'\?"),
        (GOOD + "seed: 1\nseed: 2\n", r"mine\.yml:10: seed is already in line 9"),
        (GOOD.replace("1e-7", "small"), r"mine\.yml:7: learning_rate: 'small': takes a number"),
        (GOOD.replace("1e-7", ".nan"), r"mine\.yml:7: .* finite"),
        (GOOD.replace("1e-7", "0"), r"mine\.yml:7: .* above 0"),
        (GOOD.replace("1e-7", "true"), r"mine\.yml:7: .* number"),
        (GOOD.replace("num_epochs: 3", "num_epochs: three"), r"mine\.yml:8: num_epochs: 'three': takes a whole number"),
        (GOOD.replace("lora_r: 4", "lora_r: true"), r"mine\.yml:5"),
        (GOOD + "sample_packing: true\n", r"mine\.yml:9: sample_packing: True: a dozen rows cannot be packed"),
        (GOOD + "val_set_size: 1.5\n", r"mine\.yml:9: val_set_size: 1.5: takes a share or a number of rows"),
        (
            GOOD + "peft_use_rslora: true\n",
            r"mine\.yml:9: peft_use_rslora: True: changes the result and is not followed",
        ),
        (GOOD + "warmup_rato: \n", r"mine\.yml:9: unknown key 'warmup_rato'; did you mean 'warmup_ratio'\?"),
        (
            GOOD + "lora_target_modules: [q_proj, v_proj]\n",
            r"mine\.yml:9: lora_target_modules: .*not all linear layers",
        ),
        (GOOD + "lr_scheduler: cosine\nwarmup_steps: 1\nwarmup_ratio: 0.1\n", r"yml:11: warmup_ratio: .*keep one"),
        (GOOD + "special_tokens: {eos_token: 3}\n", r"yml:9: special_tokens: .*takes lines such as"),
        (GOOD + "warmup_steps: 10\n", r"mine\.yml:9: .*ignores warmup"),
        (GOOD + "lr_scheduler: polynomial\n", r"mine\.yml:9: .*constant_with_warmup, cosine, linear"),
        (GOOD + "micro_batch_size: 0\n", r"mine\.yml:9: .*at least 1"),
        (GOOD + "optimizer: adafactor\n", r"mine\.yml:9: .*adamw_torch"),
        (GOOD + "load_in_4bit: false\n", r"mine\.yml:9: .*QLoRA"),
        (GOOD + "bf16: maybe\n", r"mine\.yml:9: .*true or false"),
        (GOOD.replace("type: completion", "type: bradley_terry"), r"mine\.yml:2: datasets: .*type, one of completion"),
        (GOOD.replace("type: completion", "type: completion, split: test"), r"mine\.yml:2: .*split: not read"),
        (
            GOOD.replace("type: completion", "type: chat_template, roles: {assistant: [user]}, train_on_eos: all"),
            r"mine\.yml:2: .*roles, train_on_eos: not read",
        ),
        (GOOD.replace("type: completion", "type: sharegpt, roles: [gpt]"), r"mine\.yml:2: .*roles: not read"),
        (GOOD.replace("type: completion", "type: {1: 2}"), r"mine\.yml:2: .*a type, one of completion"),
        (
            GOOD.replace("type: completion", "type: {field_instruction: q, field_output: a}"),
            r"mine\.yml:2: .*columns that a type lists are instruction, input, output and system",
        ),
        (GOOD.replace("type: completion", "type: completion, path: b.md"), r"mine\.yml:3: path is already in line 3"),
        (GOOD + f"lr_scheduler: cosine\nwarmup_steps: {'9' * 401}\n", r"mine\.yml:10: warmup_steps: .*at most"),
        (GOOD.replace("lora_r: 4\n", ""), r"no lora_r; a recipe needs"),
        ("- 1\n- 2\n", r"mine\.yml:1: a recipe is a list of `key: value` lines"),
        (GOOD + "seed: [1\n", r"mine\.yml:\d+: not YAML"),
        ("a: &x 1\nb: *x\n", r"anchors and aliases"),
        ("x: !!python/object/apply:os.system [true]\n", r"mine\.yml"),
        (b"\xff\xfebase_model", r"not UTF-8"),
        ("#" * 70_000, r"70000 bytes are too long for a recipe"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_line(write, change, expected):
    with pytest.raises(InputError, match=expected):
        load_recipe(write(change))


def test_overrides_are_checked_as_a_file_is():
    assert load_recipe("tiny", num_epochs=2).num_epochs == 2
    with pytest.raises(InputError, match="override: num_epochs: 0: must be at least 1"):
        load_recipe("tiny", num_epochs=0)
    with pytest.raises(InputError, match="unknown key 'epochs'"):
        load_recipe("tiny", epochs=2)
    with pytest.raises(InputError, match=r"nothing\.yml: no such recipe"):
        load_recipe("nothing.yml")


def test_all_that_is_wrong_with_a_recipe_is_said_at_once(write):
    wrong = "lora_dropout: 2\nmax_steps: 10\nlora_rank: 4\nfp16: true\nepochs_: 2\nsample_packing: true\n"
    with pytest.raises(InputError) as refused:
        load_recipe(write(GOOD + wrong))
    lines = sorted(int(fault.partition("mine.yml:")[2].partition(":")[0]) for fault in refused.value.faults)
    assert lines == [9, 10, 11, 12, 13, 14]


def test_a_missing_key_hides_no_other_fault(write):
    """As in a recipe for all weights, where `adapter:` is empty: it is not read as the kit's own default."""
    full = GOOD.replace("lora_r: 4\nlora_alpha: 8\n", "adapter:\nload_in_4bit: false\nlora_dropout: a\n")
    with pytest.raises(InputError) as refused:
        load_recipe(write(full))
    said = sorted(refused.value.faults)
    expected = ("5: adapter: None: empty", "6: load_in_4bit: False", "7: lora_dropout: 'a'", "no lora_r, lora_alpha")
    assert len(said) == 4 and all(word in " ".join(said) for word in expected)


@pytest.mark.parametrize(
    "entry",
    [
        "type: alpaca:phi",
        "type: context_qa.load_v2",
        "type: {field_instruction: instruction, field_output: output, format: '[INST] {instruction} [/INST]'}",
        "type: sharegpt, conversation: chatml",
        "type: chat_template, field_messages: conversations, message_field_role: from, message_field_content: value",
        "type: chat_template, train_on_eos: turn, roles_to_train: [gpt], roles: {user: [human], assistant: [gpt, ai]}",
        "type: chat_template, data_files: [data/minisymposium.jsonl]",
    ],
)
def test_what_an_entry_says_of_its_columns_is_read_where_the_rows_are_the_same(write, entry):
    recipe = load_recipe(write(GOOD.replace("type: completion", entry)))
    [rows] = recipe.datasets
    assert set(rows) == {"path", "type"} and rows["path"] == "data/minisymposium.jsonl" and not recipe.train_on_inputs
    assert any("below `### ` headings, in no template" in note for note in recipe.notes)
    assert load_recipe(write(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("path", ["data", "json"])
def test_the_single_file_of_an_entry_is_its_path(write, path):
    file = "minisymposium.jsonl" if path == "data" else "data/minisymposium.jsonl"
    recipe = load_recipe(write(GOOD.replace("path: data/minisymposium.jsonl", f"path: {path}, data_files: {file}")))
    assert recipe.dataset == "data/minisymposium.jsonl"


def test_what_would_change_nothing_is_passed_over(write):
    added = "lora_target_linear: true\nlora_target_modules: [q_proj, v_proj]\nbase_model_config: tiny\ntf32: auto\n"
    recipe = load_recipe(write(GOOD + added + "report_to: wandb\nunsloth_lora_mlp: true\n"))
    assert recipe.tf32 and recipe.lora_target_linear
    assert "base_model_config, report_to, unsloth_lora_mlp" in recipe.notes[-1]
    with pytest.raises(InputError, match="base_model_config: 'other': changes the result"):
        load_recipe(write(GOOD + "base_model_config: other\n"))


def test_what_axolotl_would_do_without_a_key_is_said_where_it_is_something_else(write):
    def missing(text):
        notes = [note.partition(": no ")[2] for note in load_recipe(write(text)).notes]
        return [note.partition(":")[0] for note in notes if note]

    assert missing(GOOD) == ["adapter", "lora_target_linear", "lr_scheduler"]
    whole = GOOD + "adapter: qlora\nlora_target_linear: true\nlr_scheduler: cosine\n"
    assert missing(whole) == ["warmup_steps"] and missing(whole + "warmup_ratio: 0.1\n") == []
    assert not any(": no " in note for name in SHIPPED for note in load_recipe(name).notes)


@pytest.mark.parametrize(
    "line",
    [
        "dataset_exact_deduplication: true",
        "dataset_shard_num: 4",
        "min_sample_len: 50",
        "rl_beta: 0.1",
        "adam_epsilon: 1e-6",
    ],
)
def test_what_changes_the_rows_or_the_loss_is_refused(write, line):
    with pytest.raises(InputError, match=r"mine\.yml:9: .*changes the result and is not followed"):
        load_recipe(write(GOOD + line))


@pytest.mark.parametrize(
    "line",
    [
        "adam_epsilon: 1e-8",
        "max_grad_norm: 1",
        "bnb_config_kwargs: {bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}",
    ],
)
def test_what_the_kit_does_anyway_is_passed_over(write, line):
    assert load_recipe(write(GOOD + line)).notes[-1].endswith(f"result: {line.partition(':')[0]}")


def test_other_words_for_the_same_are_read_and_noted(write):
    recipe = load_recipe(
        write(
            GOOD.replace("num_epochs: 3", "num_epochs: 3.0").replace("type: completion", "type: alpaca, split: train")
            + "bf16: auto\noptimizer: paged_adamw_8bit\nmicro_batch_size: 2.0\ngradient_accumulation_steps: 4\n"
            "lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]\nwandb_project: a\n"
            "lr_scheduler: cosine\nwarmup_ratio: 0.1\nlora_dropout: 0.05\nval_set_size: 0.25\nfp16:\n"
            "load_in_8bit: false\n"
            "special_tokens: {pad_token: <pad>, eos_token: </s>, unk_token: , additional_special_tokens: []}\n"
            "flash_attention: true\nmax_grad_norm: 1.0\n"
        )
    )
    assert (recipe.num_epochs, recipe.bf16, recipe.optimizer, recipe.batch) == (3, True, "adamw_torch", 8)
    assert recipe.datasets == [{"path": "data/minisymposium.jsonl", "type": "alpaca"}] and not recipe.train_on_inputs
    assert (recipe.warmup_ratio, recipe.lora_dropout, recipe.val_set_size) == (0.1, 0.05, 0.25)
    assert recipe.special_tokens == {"eos_token": "</s>"}
    [eight_bit], [rows], [passed] = (
        [n for n in recipe.notes if word in n] for word in ("_8bit is", "alpaca", "passed")
    )
    assert "float32" in eight_bit and "`### ` headings" in rows
    assert passed.endswith(": wandb_project, fp16, load_in_8bit, flash_attention, max_grad_norm")
    assert load_recipe(write(recipe.to_yaml())) == recipe


def test_axolotls_example_recipes_are_read_or_refused_for_what_changes_the_result(write):
    examples = yaml.safe_load((ROOT / "tests" / "fixtures" / "axolotl" / "recipes.yml").read_text())
    counts, faults = Counter(), []
    for own in examples["recipes"].values():
        keys = {k: v for k, v in examples["common"].items() if k not in own.pop("absent", ())} | own
        try:
            recipe = load_recipe(write(yaml.safe_dump(keys | {"sample_packing": False})))
            counts["read with notes" if recipe.notes else "read"] += 1
        except InputError as error:
            counts["refused"] += 1
            faults += error.faults
    assert counts == {"read with notes": 12, "refused": 24}
    # None is refused for where it logs, on what it runs, or how fast.
    words = ("wandb", "attention", "deepspeed", "fsdp", "logging", "saves", "evals", "liger", "optimizer", "bf16")
    assert not [fault for fault in faults if any(f": {word}" in fault for word in words)]


def test_a_path_that_is_not_where_the_user_stands_is_looked_up_beside_the_recipe(write, tmp_path):
    path = write(GOOD.replace("data/minisymposium.jsonl", "rows.jsonl"))
    assert load_recipe(path).dataset == "rows.jsonl"
    (tmp_path / "rows.jsonl").touch()
    assert load_recipe(path).dataset == str(tmp_path / "rows.jsonl")
