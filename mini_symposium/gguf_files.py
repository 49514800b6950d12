"""GGUF files read back: as a model's tensors, under the names that transformers has."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch

from mini_symposium.errors import RunError
from mini_symposium.models.safetensors_files import Tensors


class _Reader(gguf.GGUFReader):
    """Steps over lists: a vocabulary would be taken apart word by word, for seconds, and nothing here reads it."""

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        view, at = memoryview(self.data), orig_offs + 12
        kind, length = (int.from_bytes(view[start:end], "little") for start, end in ((at - 12, at - 8), (at - 8, at)))
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(length):
                at += 8 + int.from_bytes(view[at : at + 8], "little")
        else:
            at += length * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]).itemsize
        return at - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


def tensor_types(file: Path) -> dict[str, int]:
    """How many matrices of a GGUF file are stored in which type: a K-quant may be mostly something else.

    K-quants pack rows in blocks of 256; a tensor with rows of another length falls back to a type with blocks of 32.
    """
    counts = {}
    for tensor in _Reader(file).tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def read_gguf(file: Path, names: Sequence[str]) -> Tensors:
    """A GGUF file's tensors in float32, dequantised, under the names and in the order that transformers has.

    llama.cpp turns the rows of Llama's query and key matrices, because it rotates neighbouring elements where
    transformers rotates the two halves of a head (`permute` in its conversion/llama.py); here they are turned back.

    Parameters
    ----------
    names
        The model's own, as in its safetensors.

    Raises
    ------
    RunError
        If the file lacks a tensor, or its architecture has no names known here.
    """
    reader = _Reader(file)
    architecture = reader.fields["general.architecture"].contents()
    found = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}

    def setting(key: str) -> int:
        return reader.fields[f"{architecture}.{key}"].contents()

    mapping = gguf.get_tensor_name_map(kinds[architecture], setting("block_count"))
    theirs = {name: found.get(mapping.get_name(name, try_suffixes=(".weight", ".bias"))) for name in names}
    for name, tensor in theirs.items():
        if tensor is None:
            raise RunError(f"{file.name}: holds no {name}; its architecture, {architecture}, is not read here")

    def one(name: str) -> torch.Tensor:
        data = torch.tensor(gguf.dequantize(theirs[name].data, theirs[name].tensor_type))
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = setting("attention.head_count" if "q_proj" in name else "attention.head_count_kv")
            data = data.reshape(heads, -1, 2, data.shape[-1]).transpose(1, 2).reshape(data.shape)
        return data.contiguous()

    return Tensors(tuple(names), one)
