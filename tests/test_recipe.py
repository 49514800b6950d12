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
        (GOOD + "val_set_size: 0.1\n", r"mine\.yml:9: val_set_size"),
        (GOOD + "eval_steps: 10\n", r"mine\.yml:9: unknown key 'eval_steps'"),
        (GOOD + "warmup_steps: 10\n", r"mine\.yml:9: .*ignores warmup"),
        (GOOD + "lr_scheduler: polynomial\n", r"mine\.yml:9: .*constant, cosine, linear"),
        (GOOD + "micro_batch_size: 4\n", r"mine\.yml:9: .*another dose"),
        (GOOD + "optimizer: adamw_bnb_8bit\n", r"mine\.yml:9: .*8-bit"),
        (GOOD + "load_in_4bit: false\n", r"mine\.yml:9: .*QLoRA"),
        (GOOD + "bf16: maybe\n", r"mine\.yml:9: .*true or false"),
        (GOOD.replace("type: completion", "type: alpaca"), r"mine\.yml:2: datasets"),
        (GOOD.replace("type: completion", "type: completion, split: train"), r"mine\.yml:2: .*split: not read"),
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
