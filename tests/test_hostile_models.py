"""Model directories, adapters and weights from anywhere: nothing in them runs, and what lies is refused."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from conftest import only_ours
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hostile_input import EXPECTED, MALFORMED, mutated, texts

from mini_symposium.data.dataset import Example, tokenize
from mini_symposium.errors import InputError
from mini_symposium.models.adapters import read_adapters
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import load_model, load_tokenizer, model_config
from mini_symposium.models.safetensors_files import read_header, read_tensor

HEADERS = sorted(name for name in EXPECTED if name.startswith("safetensors/"))


@pytest.mark.parametrize("name", HEADERS)
def test_a_lying_header_is_refused_for_its_lie(name):
    with pytest.raises(InputError) as caught:
        read_header(MALFORMED / name)
    assert EXPECTED[name] in str(caught.value)
    assert only_ours(read_header, MALFORMED / name) is None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def whole(scratch) -> bytes:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(0, 4),
        "c": torch.tensor(True),
        "d": torch.ones(5).half(),
    }
    save_file(tensors, scratch / "whole.safetensors")
    return (scratch / "whole.safetensors").read_bytes()


counts = st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64, 10**400, 1.0, True, None, "8", [8]])
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "BOOL", "I64", "F8_E5M2", 3, None])},
    optional={"shape": st.lists(counts, max_size=3) | counts, "data_offsets": st.lists(counts, max_size=3) | counts},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "../x", ""]), entries | counts, max_size=3)


@given(data=st.data())
def test_any_weights(scratch, data):
    """What is read is what safetensors reads, and what it refuses is refused."""
    header = headers.map(lambda h: json.dumps(h).encode()).map(lambda t: struct.pack("<Q", len(t)) + t + bytes(24))
    content = data.draw(mutated([whole(scratch)]) | header | st.binary(max_size=64))
    path = scratch / "any.safetensors"
    path.write_bytes(content)
    found = only_ours(read_header, path)
    try:
        theirs = load_file(path)
    except Exception:
        theirs = None
    if found is not None and theirs is not None:
        assert found.keys() == theirs.keys()
        for name, tensor in found.items():
            assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
            assert torch.equal(read_tensor(path, name).nan_to_num(), theirs[name].nan_to_num())
    assert found is None or theirs is not None, "safetensors refuses it"


class Owned:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def model(tmp_path):
    """A copy of `tiny`, to be spoilt."""
    shutil.copytree(local_directory("tiny"), tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def load(folder):
    load_tokenizer(str(folder))
    model_config(str(folder))
    return load_model(str(folder), load_in_4bit=False)


def test_pickles_beside_safetensors_are_not_opened_and_alone_are_refused(model, tmp_path):
    payload = pickle.dumps(Owned(tmp_path / "owned"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl", "optimizer.pth", "x.ckpt"):
        (model / name).write_bytes(payload)
    assert load(model) is not None
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds pytorch_model\.bin, .*; only safetensors are loaded"):
        load(model)
    (model / "model.safetensors").write_bytes(payload)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(model)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_code_that_comes_with_a_model_is_not_run(model, tmp_path, file):
    (model / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\nclass X: pass\n")
    change(model / file, auto_map={"AutoConfig": "mine.X", "AutoTokenizer": ["mine.X", "mine.X"]})
    with pytest.raises(InputError, match=rf"{file}: asks to run code that came with the model"):
        load(model)
    assert not (tmp_path / "owned").exists()


CONFIGS = {
    "no json": lambda f: (f / "config.json").write_text("{"),
    "a list": lambda f: (f / "config.json").write_text("[]"),
    "nested": lambda f: (f / "config.json").write_text("[" * 100_000),
    "latin-1": lambda f: (f / "config.json").write_bytes(b'{"a": "\xe9"}'),
    "a pipe": lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
    "weights in a pipe": lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
    "no type": lambda f: change(f / "config.json", model_type=None),
    "unknown type": lambda f: change(f / "config.json", model_type="../../x"),
    "another type": lambda f: change(f / "config.json", model_type="bert"),
    "layers without end": lambda f: change(f / "config.json", num_hidden_layers=10**12),
    "layers in words": lambda f: change(f / "config.json", num_hidden_layers="three"),
    "no heads": lambda f: change(f / "config.json", num_attention_heads=0),
    "a hidden size of text": lambda f: change(f / "config.json", hidden_size="128"),
    "another hidden size": lambda f: change(f / "config.json", hidden_size=256),
    "another vocabulary": lambda f: change(f / "config.json", vocab_size=77),
    "an unknown activation": lambda f: change(f / "config.json", hidden_act="os.system"),
    "an adapter": lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}'),
    "half a tokenizer": lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:5000]),
    "a tokenizer of text": lambda f: (f / "tokenizer.json").write_text('"hello"'),
    "a shard elsewhere": lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../../other.safetensors"}}'
    ),
    "a shard that is not there": lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    ),
    "an index without a map": lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
    "half of the weights": lambda f: os.truncate(f / "model.safetensors", 100_000),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_directory_that_is_not_what_it_says_is_refused(model, kind):
    CONFIGS[kind](model)
    assert only_ours(load, model) is None


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": "tiny",
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 128), name.format("B"): torch.ones(128, 2)},
        folder / "adapter_model.safetensors",
    )
    return folder


ADAPTERS = {
    "rank zero": lambda f: change(f / "adapter_config.json", r=0),
    "rank in words": lambda f: change(f / "adapter_config.json", r="two"),
    "no alpha": lambda f: change(f / "adapter_config.json", lora_alpha=None),
    "another kind": lambda f: change(f / "adapter_config.json", peft_type="IA3"),
    "another way to scale": lambda f: change(f / "adapter_config.json", use_dora=True),
    "replicated layers": lambda f: change(f / "adapter_config.json", layer_replication=[[0, 2]]),
    "no kind of adapter": lambda f: change(f / "adapter_config.json", peft_type="os.system"),
    "a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "no json": lambda f: (f / "adapter_config.json").write_text("{"),
    "nested": lambda f: (f / "adapter_config.json").write_text("[" * 100_000),
    "a pickle": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
    "a vector": lambda f: save_file(
        {"x.lora_A.weight": torch.ones(2), "x.lora_B.weight": torch.ones(3, 2)}, f / "adapter_model.safetensors"
    ),
    "a scalar": lambda f: save_file(
        {"x.lora_A.weight": torch.tensor(1.0), "x.lora_B.weight": torch.tensor(1.0)}, f / "adapter_model.safetensors"
    ),
    "half": lambda f: save_file({"x.lora_A.weight": torch.ones(2, 3)}, f / "adapter_model.safetensors"),
    "nothing": lambda f: save_file({}, f / "adapter_model.safetensors"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_is_not_what_it_says_is_refused(adapter, kind):
    assert read_adapters({adapter: 1.0})[0]
    ADAPTERS[kind](adapter)
    assert only_ours(read_adapters, {adapter: 1.0}) is None


@pytest.mark.parametrize("name", ["mistral_tokenizer", "proxy_tokenizer"])
@given(prompt=texts | st.text(), completion=texts | st.text())
def test_any_text_becomes_a_row_that_keeps_its_guards_or_is_refused(name, request, prompt, completion):
    tokenizer = request.getfixturevalue(name)
    example = Example("a query", (), prompt, completion, "mine.md:1")
    for completion_only in (True, False):
        rows = only_ours(tokenize, [example], tokenizer, 512, completion_only)
        if rows:
            ids, mask = rows[0].input_ids, rows[0].completion_mask
            assert len(ids) == len(mask) <= 512 and ids[-1] == tokenizer.eos_token_id and mask[-1] == 1
            assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("name", ["mistral_tokenizer", "proxy_tokenizer"])
@pytest.mark.parametrize("piece", ["a", "\n", "### ", "巴", "\u200b"])
def test_a_megabyte_in_a_row_is_refused(name, piece, request):
    text = piece * (1_000_000 // len(piece.encode()))
    example = Example("a query", (), "Why?\n", text, "mine.md:1")
    assert only_ours(tokenize, [example], request.getfixturevalue(name), 512, True) is None
