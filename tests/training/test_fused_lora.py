"""The fused pass computes what PEFT computes; on real weights where precision matters, on tiny ones elsewhere."""

import itertools
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from mini_symposium.data.dataset import load_examples, tokenize
from mini_symposium.models.base_files import local_directory
from mini_symposium.models.base_models import compute_in_float32, load_model
from mini_symposium.models.devices import training_dtype
from mini_symposium.run import find
from mini_symposium.training import fused_lora
from mini_symposium.training.fused_lora import AdapterVectors, FusedAdapters, _TokenLosses, linear_groups
from mini_symposium.training.memory_plan import FAMILIES


def adapted(base, ranks=(8,), **options):
    """A model with an adapter of each rank, neither half of any of them zero."""
    model = load_model(base, **options)
    for k, rank in enumerate(ranks):
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(rank)
        if k == 0:
            model = get_peft_model(model, lora, adapter_name="adapter0")
        else:
            model.add_adapter(f"adapter{k}", lora)
        for name, parameter in model.named_parameters():
            if f".adapter{k}." in name:
                parameter.data = parameter.data.float()
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.01)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if training_dtype() == torch.float32:
        compute_in_float32(model)
    return model.train()


def as_in_training():
    return torch.autocast("cpu", torch.bfloat16, enabled=training_dtype() == torch.bfloat16)


def peft_gradient(model, name="adapter0"):
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if f".{name}." in n])


def gradient(fused, name="adapter0"):
    """As `peft_gradient`, and none from now on."""
    own = fused.adapters[name]
    found = torch.cat([piece.flatten() for piece in own.pieces([vector.grad for vector in own.vectors])])
    for vector in own.vectors:
        vector.grad = None
    return found


def padded(rows):
    width = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = labels[k, : len(row)] = torch.tensor(row)
    return ids, labels


@pytest.fixture(scope="module")
def rows(proxy_tokenizer):
    return [
        row.input_ids for row in tokenize(load_examples(find("data/minisymposium.md")), proxy_tokenizer, 1024, False)
    ]


def test_loss_and_gradient_are_as_close_to_float32_as_pefts(rows):
    ids, labels = padded(rows[:1])
    exact = adapted("SmolLM2-135M-Instruct", dtype=torch.float32)
    loss = exact(input_ids=ids, labels=labels).loss
    loss.backward()
    wanted = peft_gradient(exact)
    model = adapted("SmolLM2-135M-Instruct")
    with as_in_training():
        peft = model(input_ids=ids, labels=labels).loss
    peft.backward()
    theirs = peft_gradient(model)
    fused = FusedAdapters(model, ["adapter0"])
    own = fused.losses(ids, labels)
    own.sum().backward()
    ours = gradient(fused)
    assert own.item() == pytest.approx(loss.item(), abs=0.01)
    error, their_error = ((found - wanted).norm() / wanted.norm() for found in (ours, theirs))
    assert error < max(1.1 * their_error, 0.02)


def small(family: str, **options):
    """A model of a family with random weights, norms and biases among them, and two adapters."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 512, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **shape, **options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, adapter_name="adapter0")
    model.add_adapter("adapter1", lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    return model.train()


WINDOW = {"sliding_window": 16, "head_dim": 32}
"""Shorter than the rows; and heads wider than hidden_size / heads."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {"attention_multiplier": 0.1, "residual_multiplier": 0.3, "embedding_multiplier": 5.0, "logits_scaling": 4.0}
OPTIONS = {
    "llama": {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "mistral": WINDOW,
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": True},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "granite": GRANITE,
}
"""What is unusual in each family; the others have it in their layers."""


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_losses_and_gradients_of_peft(family, kind):
    model = small(family, **OPTIONS.get(family, {}))
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted = []
    for k in range(2):
        model.set_adapter(f"adapter{k}")
        model.zero_grad()
        loss = model(input_ids=ids[k : k + 1], labels=ids[k : k + 1]).loss
        loss.backward()
        wanted.append((loss.item(), peft_gradient(model, f"adapter{k}")))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fused = FusedAdapters(model, ["adapter0", "adapter1"], kind=kind)
    losses = fused.losses(ids, ids)
    losses.sum().backward()
    for k, (loss, theirs) in enumerate(wanted):
        assert losses[k].item() == pytest.approx(loss, rel=1e-5)
        assert (gradient(fused, f"adapter{k}") - theirs).norm() < 1e-4 * theirs.norm()


def test_every_residency_gives_the_same_bits():
    model = adapted("tiny", (8, 4))
    ids = torch.randint(5, 30000, (2, 40), generator=torch.Generator().manual_seed(0))
    for kind in ("cpu", "cuda"):
        found = []
        for resident, checkpointing in itertools.product((True, False), (False, True)):
            options = {"resident": resident, "checkpointing": checkpointing, "kind": kind}
            fused = FusedAdapters(model, ["adapter0", "adapter1"], **options)
            losses = fused.losses(ids, ids)
            losses.sum().backward()
            found.append((losses.detach(), gradient(fused)))
        assert all(torch.equal(losses, found[0][0]) and torch.equal(g, found[0][1]) for losses, g in found[1:])


def of_a_shape_with_whole_blocks(folder):
    """A directory with a model whose scales fill the blocks in which they are quantised."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("mistral", **shape, num_key_value_heads=2, vocab_size=30000)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def test_a_gpus_way_has_the_bits_of_layers_that_are_dequantised_and_unpacked_one_by_one(tmp_path, monkeypatch):
    model, apart = (adapted(of_a_shape_with_whole_blocks(tmp_path / name), (8, 4)) for name in "ab")
    ids = torch.randint(5, 30000, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for one, ahead in ((model, 2**27), (apart, 0)):
        monkeypatch.setattr(fused_lora, "AHEAD", ahead)
        fused = FusedAdapters(one, ["adapter0", "adapter1"], resident=False, kind="cuda")
        assert all(layer.packed is not None for layer in fused.weights)
        if not ahead:
            for layer in fused.weights:
                layer.packed = None
        losses = fused.losses(ids, ids)
        losses.sum().backward()
        found += [losses.detach(), gradient(fused), gradient(fused, "adapter1")]
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
    for layer in fused.weights:  # after PEFT's layers have been given views of what is dequantised as one
        layer.__init__(layer.groups)
        assert all(torch.equal(a, group.weight()) for a, group in zip(layer.dequantised(), layer.groups, strict=True))
    with as_in_training():
        for k in range(2):
            model.set_adapter(f"adapter{k}")
            peft = model(input_ids=ids[k : k + 1], labels=ids[k : k + 1]).loss
            assert found[0][k].item() == pytest.approx(peft.item(), abs=0.02)


def test_of_a_base_in_4_bits_the_backward_pass_keeps_no_dequantised_weight(tmp_path):
    model = adapted(of_a_shape_with_whole_blocks(tmp_path / "base"))
    fused = FusedAdapters(model, ["adapter0"], resident=False, kind="cuda")
    ids = torch.randint(5, 30000, (1, 40), generator=torch.Generator().manual_seed(0))
    made, real = [], fused_lora.LayerWeights.dequantised

    def dequantised(layer):
        weights = real(layer)
        made.append(weakref.ref(weights[0]._base))
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_lora.LayerWeights, "dequantised", dequantised)
        losses = fused.losses(ids, ids)
        assert len(made) == 3 and not any(weights() is not None for weights in made)
        losses.sum().backward()
    assert len(made) == 6 and sum(weights() is not None for weights in made) == 1


def test_kept_weights_are_what_the_4_bit_kernel_would_see():
    model = adapted("tiny")
    fused = FusedAdapters(model, ["adapter0"])
    for layer, groups in zip(fused.linears, fused.bases, strict=True):
        assert [len(linears) for linears in layer] == [3, 1, 2, 1]
        for linears, group in zip(layer, groups, strict=True):
            bases = [linear.get_base_layer().weight for linear in linears]
            assert torch.equal(group.kept, torch.cat([dequantize_4bit(base.data, base.quant_state) for base in bases]))


def test_adapters_of_different_ranks_and_rows_do_not_touch_each_other(rows):
    """Each row's loss and gradient are those of a batch of one; padding and the other ranks change nothing."""
    short, long = ([i % 30000 for i in row] for row in sorted(rows, key=len)[:: len(rows) - 1])
    model = adapted("tiny", (8, 2))
    names = ["adapter0", "adapter1"]
    fused = FusedAdapters(model, names)
    together = fused.losses(*padded([short, long]))
    together.sum().backward()
    joint = [gradient(fused, name) for name in names]
    for k, row in enumerate((short, long)):
        solo = FusedAdapters(model, names[k : k + 1])
        alone = solo.losses(*padded([row]))
        alone.sum().backward()
        assert together[k].item() == pytest.approx(alone.item(), rel=1e-4)
        own = gradient(solo, names[k])
        assert (own - joint[k]).norm() < 0.01 * own.norm()


def test_adapters_take_turns_on_two_threads_and_each_gets_the_bits_it_gets_alone(rows):
    """Of rows of other lengths too, under a weight other than 1, and in a probe."""
    model = adapted("tiny", (8, 8, 4))
    names = [f"adapter{k}" for k in range(3)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = FusedAdapters(model, names)
        assert together.threads._max_workers == 2
        torch.set_num_threads(1)
        solo = [FusedAdapters(model, [name]) for name in names]
    finally:
        torch.set_num_threads(before)
    for start in range(3):
        some = [[i % 30000 for i in row[: 40 + 9 * k]] for k, row in enumerate(rows[start : start + 3])]
        with as_in_training():
            losses = together.losses(*padded(some))
        (losses.sum() * 0.5).backward()
        gradients = [gradient(together, name) for name in names]
        with torch.no_grad(), as_in_training():
            assert torch.equal(together.losses(*padded(some)), losses)
        torch.set_num_threads(1)
        for k, alone in enumerate(solo):
            with as_in_training():
                [own] = alone.losses(*padded([some[k]]))
            (own * 0.5).backward()
            assert own == losses[k] and torch.equal(alone.matches[0], together.matches[k])
            assert torch.equal(gradient(alone, names[k]), gradients[k])
        torch.set_num_threads(before)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_layers_have_the_losses_and_gradients_of_plain_ones_for_rows_of_any_length(tmp_path):
    """In the proxy's shape, where a layer that is compiled for a fixed length of 256 has no gradients, but NaN; with
    three of its thirty layers, as many as are compiled together."""
    config = AutoConfig.from_pretrained(local_directory("SmolLM2-135M-Instruct"), num_hidden_layers=3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model, names = adapted(str(tmp_path), (16, 16)), ["adapter0", "adapter1"]
    ids = torch.randint(5, 30000, (2, 256), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for fused in (FusedAdapters(model, names, compiled=compiled) for compiled in (True, False)):
            for length in (256, 90):
                with as_in_training():
                    losses = fused.losses(ids[:, :length], ids[:, :length])
                losses.sum().backward()
                found.append((bool(fused.compiled), losses.detach(), [gradient(fused, name) for name in names]))
    finally:
        torch.set_num_threads(before)
    for (compiled, ours, own), (_, losses, plain) in zip(found[:2], found[2:], strict=True):
        assert compiled and (ours - losses).abs().max() < 5e-3
        assert all((a - b).norm() < 0.1 * b.norm() for a, b in zip(own, plain, strict=True))


def test_only_supervised_positions_count():
    model = adapted("tiny")
    ids = torch.randint(5, 30000, (1, 30), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(30) < 20, -100)
    with as_in_training():
        wanted = model(input_ids=ids, labels=labels).loss.item()
    assert FusedAdapters(model, ["adapter0"]).losses(ids, labels).item() == pytest.approx(wanted, abs=5e-3)


NOT_COMPILED = """
import torch
from tests.training.test_fused_lora import adapted
from mini_symposium.training.fused_lora import FusedAdapters
model = adapted("tiny", (8,))
ids = torch.randint(5, 30000, (1, 30), generator=torch.Generator().manual_seed(0))
fused, plain = (FusedAdapters(model, ["adapter0"], compiled=compiled) for compiled in (True, False))
losses = [each.losses(ids, ids) for each in (fused, plain)]
assert torch.equal(*losses) and not fused.compiled
losses[0].sum().backward()
"""


def test_a_broken_compiler_does_not_stop_a_run(tmp_path):
    own = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", NOT_COMPILED], capture_output=True, text=True, env=own, cwd=find("."))
    assert done.returncode == 0 and "could not be compiled" in done.stderr, done.stderr[-2000:]


def test_the_first_of_equally_likely_tokens_is_the_likeliest_and_the_gradient_is_torchs():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randint(-1, 2, (n, 4), generator=generator).float() for n in (50, 30))  # many ties
    targets = torch.multinomial(((hidden @ head.T) ** 2 + 0.1).pow(4), 1, generator=generator)[:, 0]
    hidden.requires_grad_()
    losses, matches = _TokenLosses.apply(hidden, head, targets, torch.empty(16, 30), 8)
    logits = hidden @ head.T
    ties = (logits == logits.amax(-1, keepdim=True)).gather(1, targets[:, None])[:, 0]
    assert torch.equal(matches, logits.argmax(-1) == targets) and 0 < matches.sum() < ties.sum()
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, wanted)
    weights = torch.rand(50, generator=generator)
    [found], [theirs] = (torch.autograd.grad((each * weights).sum(), hidden) for each in (losses, wanted))
    assert torch.allclose(found, theirs, atol=1e-6)


def stepped(parameters, gradients, steps=3):
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True)
    for _ in range(steps):
        for parameter, own in zip(parameters, gradients, strict=True):
            parameter.grad = own.clone()
        optimizer.step()
    return [optimizer.state[parameter] for parameter in parameters]


def test_a_step_of_the_vectors_is_a_step_of_pefts_parameters_and_its_state_is_theirs():
    """In a layout for a larger rank too, of which nothing else moves."""
    model, other = (adapted("tiny", (4,)) for _ in range(2))
    decoder = model.get_base_model().get_decoder()
    own = AdapterVectors(decoder, linear_groups(decoder), "adapter0", 6)
    named = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
    assert [id(p) for _, p in named] == [id(p) for p in own.places]
    theirs = [p for n, p in other.named_parameters() if "lora_" in n]
    assert all(torch.equal(p, q) for (_, p), q in zip(named, theirs, strict=True))
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) for k, p in enumerate(theirs)]
    wide = [torch.zeros_like(vector.detach()) for vector in own.vectors]
    for piece, gradient in zip(own.pieces(wide), gradients, strict=True):
        piece.copy_(gradient)
    states, wanted = stepped(own.vectors, wide), stepped(theirs, gradients)
    assert all(torch.equal(p, q) for (_, p), q in zip(named, theirs, strict=True))
    split = own.split(states)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(split, wanted, strict=True) for key in b)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(own.join(split), states, strict=True) for key in b)
    moved = sum(vector.count_nonzero() for vector in own.vectors)
    assert moved <= sum(p.numel() for p in theirs) < sum(vector.numel() for vector in own.vectors)
    for state in split:
        state["step"] += 1  # each its own: a resumed run of plain PEFT counts them one by one
    assert all(state["step"] == 4 for state in split)
