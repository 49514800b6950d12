"""An adapter as one float32 vector for each decoder layer: on the proxy 30 tensors to clip and step, not PEFT's 420.

PEFT's parameters become views of the vectors, so that what PEFT saves, loads or computes with is what trains.

Shapes: A is (r, in), B (out, r). A vector holds, for one group after the other of projections that read the same input,
the A of each, then the B of each. It may be laid out for a larger rank than the adapter's, so that adapters of several
ranks stack; what is left over stays zero, for so is its gradient.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Projections of a decoder layer that read the same input."""


@dataclass(frozen=True)
class Shapes:
    """Of the projections of a layer."""

    ins: tuple[int, ...]
    """Inputs of each group."""
    outs: tuple[tuple[int, ...], ...]
    """Outputs of each projection, group by group."""

    def sizes(self, rank: int) -> list[int]:
        """Lengths of the pieces of a vector: for each group all its A as one, then each B."""
        return [
            size
            for width, outs in zip(self.ins, self.outs, strict=True)
            for size in (len(outs) * rank * width, *(out * rank for out in outs))
        ]


def shapes_of(layer) -> Shapes:
    """Of a decoder layer whose projections have adapters."""
    groups = [[layer.get_submodule(name).get_base_layer() for name in group] for group in GROUPS]
    return Shapes(
        tuple(group[0].in_features for group in groups), tuple(tuple(p.out_features for p in group) for group in groups)
    )


def unpacked(vectors: torch.Tensor, scalings: torch.Tensor, shapes: Shapes, dtype: torch.dtype) -> Iterator[tuple]:
    """Of a layer's adapters, (K, length), each group's A, (K, ranks, in), and scaled B, (K, out, ranks).

    The B of a group stand on the diagonal, so that one product serves them all.
    """
    rank = vectors.shape[1] // sum(shapes.sizes(1))
    pieces, scaling = iter(vectors.split(shapes.sizes(rank), 1)), iter(scalings.split(1, 1))
    for width, outs in zip(shapes.ins, shapes.outs, strict=True):
        a = next(pieces).view(-1, len(outs) * rank, width).to(dtype)
        bs = [(next(pieces).view(-1, out, rank) * next(scaling)[..., None]).to(dtype) for out in outs]
        yield a, torch.cat([F.pad(b, (j * rank, (len(outs) - 1 - j) * rank)) for j, b in enumerate(bs)], 1)


class AdapterVectors:
    """The adapter `name` of `layers`, laid out for `rank`.

    It takes over PEFT's parameters; of several for one adapter the last made does.

    Attributes
    ----------
    vectors : list of Tensor
        One for each layer, (1, length): the leaves that train.
    scalings : list of Tensor
        For each layer alpha / r of each projection, (1, 7).
    """

    def __init__(self, layers: Iterable[torch.nn.Module], name: str, rank: int):
        self.vectors, self.scalings, self.places = [], [], {}
        for number, layer in enumerate(layers):
            shapes, start, places = shapes_of(layer), 0, {}
            for group, width in zip(GROUPS, shapes.ins, strict=True):
                modules = [layer.get_submodule(projection) for projection in group]
                sides = [(module.lora_A[name].weight, (rank, width)) for module in modules]
                sides += [(p.lora_B[name].weight, (p.get_base_layer().out_features, rank)) for p in modules]
                for parameter, shape in sides:
                    places[parameter] = number, start, shape
                    start += math.prod(shape)
            # In the order of PEFT, in which a checkpoint keeps an optimizer's state.
            self.places |= {p: places[p] for key, p in layer.named_parameters() if f".{name}." in key}
            scaling = [layer.get_submodule(projection).scaling[name] for group in GROUPS for projection in group]
            where = parameter.device
            self.vectors.append(torch.zeros(1, start, device=where))
            self.scalings.append(torch.tensor([scaling], device=where))
        for parameter, piece in zip(self.places, self.pieces(self.vectors), strict=True):
            piece.copy_(parameter.detach())
            parameter.data = piece
        for vector in self.vectors:
            vector.requires_grad_()

    def pieces(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The views of `vectors`, or of what has their shapes, that are PEFT's parameters, in its order."""
        return [
            vectors[number][0, start : start + math.prod(shape)].view(shape)[: parameter.shape[0], : parameter.shape[1]]
            for parameter, (number, start, shape) in self.places.items()
        ]

    def split(self, states: Sequence[Mapping]) -> list[dict]:
        """An optimizer's states of the vectors, as those of PEFT's parameters if these had been stepped one by one."""
        scalars, keys = _kinds(states)
        pieces = [self.pieces([state[key] for state in states]) for key in keys]
        return [
            {key: states[number][key].clone() for key in scalars}
            | {key: piece.clone(memory_format=torch.contiguous_format) for key, piece in zip(keys, own, strict=True)}
            for (number, _, _), *own in zip(self.places.values(), *pieces, strict=True)
        ]

    def join(self, states: Sequence[Mapping]) -> list[dict]:
        """The reverse of `split`."""
        scalars, keys = _kinds(states)
        joined = [
            {key: states[0][key].clone() for key in scalars} | {key: torch.zeros_like(vector.detach()) for key in keys}
            for vector in self.vectors
        ]
        for key in keys:
            for piece, state in zip(self.pieces([state[key] for state in joined]), states, strict=True):
                piece.copy_(state[key])
        return joined


def _kinds(states: Sequence[Mapping]) -> tuple[list[str], list[str]]:
    """Keys of an optimizer's state: those of one number, and those of a tensor with the parameter's shape."""
    return [key for key in states[0] if not states[0][key].dim()], [key for key in states[0] if states[0][key].dim()]
