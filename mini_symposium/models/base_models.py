"""Base models in memory: the tokenizer, the weights in NF4 or not, and the memory that training takes.

Code that comes with a model is never run. `base_files` finds a model's files.
"""

import gc
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path

import bitsandbytes
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from mini_symposium.errors import InputError, reason
from mini_symposium.files.writing import written_whole
from mini_symposium.models.base_files import kept_in_4_bits, local_directory, ours
from mini_symposium.models.devices import (
    FILLED,
    device,
    freed_memory_given_back,
    memory,
    out_of_memory,
    roomy,
    training_dtype,
)
from mini_symposium.models.safetensors_files import read_header, weight_files
from mini_symposium.recipe import Recipe
from mini_symposium.run import find, read_object

# Progress bars and advice of transformers would bury what the notebooks print.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*deprecated and will be removed in v6", category=FutureWarning)


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `base_model`. It pads on the left, as batched decoding needs.

    A model without a padding token (Mistral) gets `<unk>` for it, not EOS: a collator that masks padding in the loss
    would mask EOS too, and the model would never learn to stop.

    Raises
    ------
    InputError
        If there is no such model, its tokenizer cannot be loaded, or nothing says how its tokens are made.
    """
    folder = local_directory(base_model)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        # tokenizer.model or vocab.json alone would load, with other tokens and without BOS
        raise InputError(
            f"{folder}: no tokenizer.json and no tokenizer_config.json; copy them from where the model is from"
        )
    named = None
    if not (folder / "tokenizer.json").is_file():  # AutoTokenizer would read a SentencePiece file by another class
        named = getattr(transformers, str(read_object(folder / "tokenizer_config.json").get("tokenizer_class")), None)
        named = named if isinstance(named, type) and issubclass(named, PreTrainedTokenizerBase) else None
    try:
        options = {"padding_side": "left", "trust_remote_code": False}
        tokenizer = (named or AutoTokenizer).from_pretrained(folder, **options)
    except Exception as error:  # tokenizers raises bare exceptions, sentencepiece and protobuf their own
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason(error)})") from error
    rows = read_object(folder / "config.json").get("vocab_size", sys.maxsize)  # a tokenizer may have more tokens
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def check_embedded(ids: Iterable[int], known: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse token ids of which a model with `known` embeddings has none; the message begins with `where`."""
    if beyond := sorted({i for i in ids if i >= known}):
        names = ", ".join(tokenizer.convert_ids_to_tokens(beyond))
        raise InputError(f"{where}: spells {names}, of which the model has no embedding; write it differently")


def check_special_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse `special_tokens` that are not the tokenizer's own: a token that is added would need a new embedding."""
    differing = [
        f"{key}: {token!r} (the tokenizer has {own!r})"
        for key, token in recipe.special_tokens.items()
        if token != (own := getattr(tokenizer, key, None))
    ]
    if differing:
        where = recipe.places.get("special_tokens", recipe.name)
        raise InputError(f"{where}: special_tokens: {', '.join(differing)}; no token is added here, remove them")


def nf4(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation (Dettmers et al. 2023, QLoRA), computing in `compute_dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_model(
    base_model: str, load_in_4bit: bool = True, dtype: torch.dtype = torch.bfloat16, dequantize: bool = False
) -> PreTrainedModel:
    """`base_model`, by default with its linear layers in NF4 on this machine's device.

    Other weights go where they fit: on the device, else in the CPU's memory, else a layer at a time from the disk. Of a
    model in the kit's cache, a CPU quantises only once: its 4-bit weights are kept there too.

    Parameters
    ----------
    load_in_4bit
        Linear layers in NF4, quantised from and to bfloat16 as in training.
    dtype
        The type that the model computes in; without `load_in_4bit`, also the type of its weights.
    dequantize
        Dequantise once and keep the result: the same numbers in four times the memory, and much faster on a CPU.
        float32 implies it, because bitsandbytes' inference kernel for CPUs rounds to bfloat16.

    Raises
    ------
    InputError
        If there is no such model, it cannot be loaded, weights are missing, or dequantised ones fit nowhere.
    """
    gc.collect()  # a trainer and its model refer to each other, so an earlier base may still be in memory
    folder, where = local_directory(base_model), device()
    dequantised = load_in_4bit and (dequantize or dtype == torch.float32)
    if dequantised or not load_in_4bit:
        headers = [read_header(path) for path in weight_files(folder)]
        size = sum(tensor.numel() for header in headers for tensor in header.values())
        size = round(size * (dtype.itemsize + (NF4_BYTES if dequantised else 0)))
        where = roomy(size)
        if where is None and dequantised:
            raise InputError(
                f"{base_model}: takes {size / 2**30:.1f} GiB dequantised, more than is free; close programs"
            )
    placement = {"device_map": {"": where}} if where else _streamed()
    on_cpu = where is not None and where.type == "cpu"
    kept = kept_in_4_bits(folder) if load_in_4bit and on_cpu and ours(folder) else folder
    source = kept if kept.is_dir() else folder
    try:
        with freed_memory_given_back():
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                output_loading_info=True,
                dtype=torch.bfloat16 if load_in_4bit else dtype,
                **({"quantization_config": nf4(dtype)} if load_in_4bit and source == folder else {}),
                **placement,
                # On a CPU the backward pass of fused attention is slower than eager for a few hundred tokens. Elsewhere
                # the model's own choice, for not every architecture has fused attention.
                attn_implementation="eager" if on_cpu else None,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:  # with a config that does not fit the weights, transformers raises anything
        if out_of_memory(error):
            raise
        raise InputError(f"{source}: cannot be loaded as a causal language model ({reason(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{source}: {len(missing)} weights that its config.json asks for are not in it, such as {missing[0]}; "
            "they would be random, so copy or download it again"
        )
    if source != kept:
        _keep_in_4_bits(model, kept)
    model.config._name_or_path = model.name_or_path = str(folder)
    if where is None:
        weakref.finalize(model, shutil.rmtree, placement["offload_folder"], ignore_errors=True)
    return model.dequantize(torch.bfloat16).to(dtype) if dequantised else model


def _keep_in_4_bits(model: PreTrainedModel, folder: Path) -> None:
    """Save a quantised model beside the one it was made from: quantising on a CPU takes seconds to minutes, reading
    the same bits less than one."""
    try:
        with written_whole(folder) as temporary:
            model.save_pretrained(temporary)
    except InputError as error:
        if not folder.is_dir():  # another process may have been faster
            print(f"not kept in 4 bits: {error}")


def _streamed() -> dict:
    """Arguments to load a model of which only a part fits into memory: accelerate reads the rest when it is used."""
    free = {"cpu": round(FILLED / 2 * memory(torch.device("cpu")))}
    if device().type == "cuda":
        free[0] = round(FILLED / 2 * memory())
    return {"device_map": "auto", "max_memory": free, "offload_folder": tempfile.mkdtemp(prefix="mini-symposium-")}


def compute_in_float32(model: PreTrainedModel) -> None:
    """Make `model` compute in float32, for training. Its 4-bit weights stay as they are, all others become float32."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point() and not isinstance(tensor, bitsandbytes.nn.Params4bit):
                tensor.data = tensor.data.float()


def four_bit_works() -> bool:
    """Whether bitsandbytes works here: a random matrix is quantised, multiplied, and comes back about the same."""
    try:
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        weight = layer.weight.data.clone()
        product = layer.to(device())(torch.eye(64, device=device())).T.cpu()
        return (product - weight).abs().max().item() < 0.25 * weight.abs().max().item()
    except Exception:  # a missing or broken native library raises anything
        return False


NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in NF4 with double quantisation: half a byte, a byte of scale for 64 weights, and 4 bytes for 256
scales."""


def predicted_bytes(
    recipe: Recipe,
    tokens: int = 0,
    adapters: int = 1,
    at_once: int = 1,
    fused: bool = False,
    resident: bool = False,
    recomputed: bool | None = None,
    shape: PreTrainedModel | None = None,
) -> dict[str, int]:
    """{part: bytes} of the tensors that training `recipe` takes, computed from shapes: no weights are loaded.

    By default those of plain PEFT and one adapter; `training.memory_plan.predicted` adds what a process takes.

    NF4 takes NF4_BYTES per weight (Dettmers et al. 2023, QLoRA, section 3). Adapters take 16 bytes per parameter:
    the float32 weight, its gradient and Adam's two moments. For the backward pass a decoder layer keeps 1.1 times the
    inputs and outputs of its linear layers. On a CPU it also keeps the attention maps, and with plain PEFT two more
    copies in float32. A recomputed layer keeps only its input. Plain PEFT holds three sets of logits in float32.
    Fused training holds those of 256 rows (2048 on a GPU), and two float32 copies of 16 of them (on a GPU of all).

    Parameters
    ----------
    tokens
        Of the longest row; `sequence_len` if 0.
    adapters, at_once
        That train in one pass, and how many of them are computed at the same time.
    fused, resident, recomputed
        As in `training.memory_plan.Acceleration`; `recomputed` is the recipe's gradient_checkpointing if None.
    shape
        `shape_of` the base model, if it is at hand.
    """
    width, on_cpu = training_dtype().itemsize, device().type == "cpu"
    model = shape or shape_of(recipe.base_model)
    config = model.config
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    weights = sum(layer.weight.numel() for layer in linear)
    rank_one = sum(layer.in_features + layer.out_features for layer in linear)
    tokens, layers = tokens or recipe.sequence_len, config.num_hidden_layers
    layer = 1.1 * rank_one / layers * tokens * width
    if on_cpu:
        layer += config.num_attention_heads * tokens**2 * (width if fused else width + 8)
    recomputed = recipe.gradient_checkpointing if recomputed is None else recomputed
    kept = layers * tokens * config.hidden_size * width + layer if recomputed else layers * layer
    block, few = (256, 16) if on_cpu else (2048, 2048)
    logits = block * width + 2 * few * 4 if fused else tokens * (3 * 4)
    dequantised = weights if resident else weights / layers if fused else max(m.weight.numel() for m in linear)
    return {
        "base, NF4": round(weights * NF4_BYTES),
        "base, other weights": width * (model.num_parameters() - weights),
        "base, dequantised" if resident else "base, dequantised for a moment": round(dequantised * width),
        "adapters, gradients, optimizer": 16 * recipe.lora_r * rank_one * adapters,
        "activations": round(kept * at_once),
        "logits": config.vocab_size * logits * (at_once if on_cpu or not fused else 1),
    }


def shape_of(base_model: str) -> PreTrainedModel:
    """The model without its weights, on the meta device.

    Raises
    ------
    InputError
        If it is not a causal decoder with linear projections, which is what is trained here.
    """
    config = model_config(base_model)
    taken = f"{base_model}: {config.model_type} is not trained here"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{taken}: it has an encoder; take a causal decoder")
    if getattr(config, "vision_config", None) is not None:
        raise InputError(f"{taken}: it has a vision tower; take a model of text alone")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{taken}: transformers has no causal decoder of it ({reason(error)})") from error
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise InputError(f"{taken}: its projections are Conv1D, which have no 4-bit form; take one with linear layers")
    return model


def model_config(base_model: str) -> PretrainedConfig:
    """The configuration of `base_model`, without its weights."""
    if base_model == "mistralai/Mistral-7B-v0.1" and not find(base_model).is_dir():
        return MistralConfig()  # its defaults are this model's shape: nothing need be downloaded
    folder = local_directory(base_model)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises anything here too
        raise InputError(f"{folder}/config.json: cannot be read ({reason(error)})") from error
