"""Several adapters over one frozen base in one pass, each with its own loss, as cheaply as the machine allows.

PEFT keeps the adapters and transformers the base; this module only computes the same losses with less work:

- the 4-bit weights never change, so where memory allows they are dequantised once (the same numbers);
- q, k and v read the same input, and so do gate and up: each set is one product, their adapters another;
- an adapter is one float32 vector a layer (`AdapterVectors`), cast and scaled where the layer is computed: on the proxy
  30 tensors to clip and step, not PEFT's 420;
- on a GPU the adapters share every product with the base, each with its own row of the batch, and nothing else: the
  gradient of the summed loss with respect to an adapter is the gradient of its own loss;
- on a CPU they share the base's memory, and each is computed by one thread as if it trained alone: the same bits, and
  threads that wait for each other once a step, where threads that share a product wait at the end of each product;
- the head runs on positions that have a label, and never holds more than a block of its logits;
- three decoder layers are compiled, not the whole model: all layers and every row length use the same code.

Shapes: K adapters (one row each), T tokens, d hidden, V words of the vocabulary.
"""

import math
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

from mini_symposium.errors import reason
from mini_symposium.models.devices import keep_freed_memory

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Projections of a decoder layer that read the same input."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder layer's projections."""

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
    """The shapes of a decoder layer whose projections have adapters."""
    groups = [[layer.get_submodule(name).get_base_layer() for name in group] for group in GROUPS]
    return Shapes(
        tuple(group[0].in_features for group in groups), tuple(tuple(p.out_features for p in group) for group in groups)
    )


def unpacked(vectors: torch.Tensor, scalings: torch.Tensor, shapes: Shapes, dtype: torch.dtype) -> Iterator[tuple]:
    """For each group of a layer's projections the adapters' A, (K, ranks, in), and scaled B, (K, out, ranks), out of
    the layer's vectors, (K, length).

    The B of a group are blocks on a diagonal, so that one product computes all of them.
    """
    rank = vectors.shape[1] // sum(shapes.sizes(1))
    pieces, scaling = iter(vectors.split(shapes.sizes(rank), 1)), iter(scalings.split(1, 1))
    for width, outs in zip(shapes.ins, shapes.outs, strict=True):
        a = next(pieces).view(-1, len(outs) * rank, width).to(dtype)
        bs = [(next(pieces).view(-1, out, rank) * next(scaling)[..., None]).to(dtype) for out in outs]
        yield a, torch.cat([F.pad(b, (j * rank, (len(outs) - 1 - j) * rank)) for j, b in enumerate(bs)], 1)


class AdapterVectors:
    """The adapter `name` of `layers` as one vector for each layer, laid out for `rank`.

    PEFT's parameters become views of the vectors, so that what PEFT saves, loads or computes with is what trains. Of
    several `AdapterVectors` for one adapter, the last made holds them.

    A is (r, in), B (out, r). A vector holds, for one group after the other of projections that read the same input, the
    A of each, then the B of each. It may be laid out for a larger rank than the adapter's, so that adapters of several
    ranks stack; what is left over stays zero, for its gradient is zero.

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
            # In PEFT's order, which is the order of a checkpoint's optimizer state.
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
        """`vectors`, or other tensors of their shapes, as views in the shapes and the order of PEFT's parameters."""
        return [
            vectors[number][0, start : start + math.prod(shape)].view(shape)[: parameter.shape[0], : parameter.shape[1]]
            for parameter, (number, start, shape) in self.places.items()
        ]

    def split(self, states: Sequence[Mapping]) -> list[dict]:
        """An optimizer's states of the vectors, as the states that PEFT's parameters would have."""
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
    """Keys of an optimizer's state that hold one number, and keys that hold a tensor of the parameter's shape."""
    return [key for key in states[0] if not states[0][key].dim()], [key for key in states[0] if states[0][key].dim()]


OPTIONS = {"cpp_wrapper": True}
"""For the compiler: the code that calls the kernels is compiled as well, which saves a twentieth of a step."""


def _norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _adapted(x, weight, a, b):  # (K, T, in) -> (K, T, out)
    if len(x) == 1:  # `bmm` would first copy `a`, because of its stride
        return F.linear(x, weight) + F.linear(F.linear(x, a[0]), b[0])
    return F.linear(x, weight) + torch.bmm(torch.bmm(x, a.mT), b.mT)


def _attention(q, k, v, mask):  # q (K, heads, T, D); k, v (K, kv heads, T, D) -> (K, heads, T, D)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # At a few hundred tokens the fused attention's backward pass is slower on a CPU than these four products.
    batch, heads, tokens, size = q.shape
    shared = k.shape[1]
    rows = (q * size**-0.5).reshape(batch * shared, heads // shared * tokens, size)  # heads that share k, stacked
    scores = torch.bmm(rows, k.reshape(batch * shared, tokens, size).mT)
    weights = torch.softmax(scores.view(-1, tokens, tokens) + mask, -1).view(batch * shared, -1, tokens)
    return torch.bmm(weights, v.reshape(batch * shared, tokens, size)).view(batch, heads, tokens, size)


def decoder_layer(x, cos, sin, mask, norms, weights, vectors, scalings, *, shapes, head_size, eps):
    """One Llama or Mistral layer with its adapters; (K, T, d) -> (K, T, d).

    `weights` holds one tensor for each of GROUPS, (out, in); `vectors` are those of `AdapterVectors`, (K, length).
    """
    rows, tokens, _ = x.shape
    qkv, o, gate_up, down = unpacked(vectors, scalings, shapes, x.dtype)
    mixed = _adapted(_norm(x, norms[0], eps), weights[0], *qkv).view(rows, tokens, -1, head_size).transpose(1, 2)
    q, k, v = mixed.split([out // head_size for out in shapes.outs[0]], 1)
    attended = _attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, mask)
    x = x + _adapted(attended.transpose(1, 2).reshape(rows, tokens, -1), weights[1], *o)
    gate, up = _adapted(_norm(x, norms[1], eps), weights[2], *gate_up).chunk(2, -1)
    return x + _adapted(F.silu(gate) * up, weights[3], *down)


def decoder_layers(x, cos, sin, mask, layers, **shape):
    """Some layers, one after the other; `layers` holds norms, weights, vectors and scalings of each."""
    for own in layers:
        x = decoder_layer(x, cos, sin, mask, *own, **shape)
    return x


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each position, and whether its label is the likeliest token. The gradient is computed in the
    forward pass, so that no logits are kept.

    Of equally likely tokens the first counts as the likeliest, as in `argmax`.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, logits, few):
        # (N, d), (V, d), (N,); scratch (block, V); rows at a time -> (N,), (N,)
        losses, matches = torch.empty(len(hidden), device=hidden.device), torch.empty_like(targets, dtype=torch.bool)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), len(logits)):
            part = slice(start, start + len(logits))
            block = torch.mm(hidden[part], head.T, out=logits[: len(hidden[part])])
            for rows, labels, loss, match in zip(
                *(t.split(few) for t in (block, targets[part], losses[part], matches[part])), strict=True
            ):
                scores, labels = torch.log_softmax(rows, -1, dtype=torch.float32), labels[:, None]
                own = scores.gather(1, labels)
                loss.copy_(-own[:, 0])
                others = scores.scatter_(1, labels, float("-inf")).amax(-1, keepdim=True)
                match.copy_((own > others)[:, 0])
                tied = (own == others)[:, 0].nonzero()[:, 0]
                if len(tied):
                    match[tied] = labels[tied, 0] < scores[tied].argmax(-1)
                rows.copy_(scores.exp_().scatter_(1, labels, own.expm1()))
            torch.mm(block, head, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(matches)
        return losses, matches

    @staticmethod
    def backward(ctx, upstream, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None


class _SideBySide(torch.autograd.Function):
    """The losses of shares with one adapter each; every share runs its forward and backward pass by itself."""

    @staticmethod
    def forward(ctx, fused, input_ids, labels, *parameters):
        losses, ctx.gradients = zip(*fused.dealt_out(input_ids, labels, gradients=True), strict=True)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, upstream):
        for gradients, weight in zip(ctx.gradients, upstream.tolist(), strict=True):
            if weight != 1:
                torch._foreach_mul_(gradients, weight)
        return None, None, None, *(gradient for gradients in ctx.gradients for gradient in gradients)


class FusedAdapters:
    """The losses of `names`, adapters of `model`, over its shared frozen base.

    Parameters
    ----------
    resident
        Keep the dequantised weights. Otherwise each layer dequantises its own when it runs, and again in the
        backward pass, where it also recomputes its activations: the base stays in 4 bits.
    checkpointing
        Recompute activations in the backward pass.
    compiled
        Compile the layers, three at a time where their number allows. Only the last bits of a sum change.
    """

    def __init__(
        self,
        model: PeftModel,
        names: Sequence[str],
        resident: bool = True,
        checkpointing: bool = False,
        compiled: bool = False,
    ):
        model.train()  # in evaluation bitsandbytes rearranges the packed weights, which are read here
        base = model.get_base_model()
        self.decoder, self.head = base.model, base.lm_head.weight
        self.checkpointing = checkpointing or not resident
        config = base.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shapes = shapes_of(self.decoder.layers[0])
        layers = partial(decoder_layers, shapes=shapes, head_size=size, eps=config.rms_norm_eps)
        self.plain, self.compiled = layers, torch.compile(layers, dynamic=False, options=OPTIONS) if compiled else None
        # Layers compiled together: what joins two of them becomes one kernel. More gain little and compile long.
        self.stride = next(n for n in ((3, 2, 1) if compiled else (1,)) if len(self.decoder.layers) % n == 0)
        self.modules = [[[layer.get_submodule(n) for n in g] for g in GROUPS] for layer in self.decoder.layers]
        self.norms = [
            (layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach())
            for layer in self.decoder.layers
        ]
        with torch.no_grad():
            self.weights = [[self._weight(group) for group in layer] for layer in self.modules] if resident else None
        cpu = self.head.device.type == "cpu"
        if cpu:
            keep_freed_memory()
        self.shares = [_Share(self, some) for some in ([[name] for name in names] if cpu else [names])]
        self.adapters = {name: own for share in self.shares for name, own in share.adapters.items()}
        count = min(len(self.shares), torch.get_num_threads())
        self.threads = (
            ThreadPoolExecutor(count, "adapters", torch.set_num_threads, (1,)) if len(self.shares) > 1 else None
        )
        self.warm = False
        # Rows of logits at a time: enough for an efficient product; and of those, as many as stay in a CPU's cache.
        self.block, self.few = (256, 16) if cpu else (2048, 2048)
        self.own = threading.local()
        self.matches: list[torch.Tensor] = []

    def _weight(self, group) -> torch.Tensor:
        """The base weights of a group of projections, stacked, with the values that the 4-bit kernel computes with."""
        layers = [module.get_base_layer() for module in group]
        parts = [
            dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            if getattr(layer.weight, "quant_state", None) is not None
            else layer.weight.detach()
            for layer in layers
        ]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.head.dtype)

    def scratch(self) -> torch.Tensor:
        """This thread's buffer for logits, (block, V)."""
        if not hasattr(self.own, "scratch"):
            self.own.scratch = self.head.new_empty(self.block, len(self.head))
        return self.own.scratch

    def layers(self, start: int, x, cos, sin, mask, adapters):
        """Output of the decoder layers from `start` on for which there are `adapters`: vectors and scalings of each."""
        numbers = range(start, start + len(adapters))
        with torch.no_grad():
            weights = [self.weights[n] if self.weights else [self._weight(g) for g in self.modules[n]] for n in numbers]
        each = [(self.norms[n], own, *adapter) for n, own, adapter in zip(numbers, weights, adapters, strict=True)]
        inputs = x, cos, sin, mask, each
        if self.compiled and torch.is_grad_enabled():  # probes are too few to compile for
            try:
                return self.compiled(*inputs)
            except BackendCompilerFailed as error:
                print(
                    f"the layer could not be compiled ({reason(error)}); continuing without",
                    file=sys.stderr,
                )
                self.compiled = None
        return self.plain(*inputs)

    def dealt_out(self, input_ids: torch.Tensor, labels: torch.Tensor, gradients: bool) -> list[tuple]:
        """Loss of each adapter, and its gradients if wanted; as many adapters at a time as there are threads."""
        kind = input_ids.device.type
        autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def work(share: _Share, ids: torch.Tensor, labels: torch.Tensor):
            length = int((labels != -100).nonzero()[:, 1].max()) + 1  # without padding
            with torch.set_grad_enabled(gradients), autocast():  # a thread inherits neither
                losses = share.losses(ids[:, :length], labels[:, :length])
            return losses.detach(), torch.autograd.grad(losses, share.parameters) if gradients else ()

        jobs = list(zip(self.shares, input_ids.split(1), labels.split(1), strict=True))
        first = []
        if gradients and not self.warm:  # the first adapter compiles, before the others run the compiled code
            first.append(self.threads.submit(work, *jobs.pop(0)).result())
            self.warm = True
        return first + list(self.threads.map(lambda job: work(*job), jobs))

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each adapter on its own row; (K, T), (K, T) -> (K,), in nats a token.

        Row k belongs to adapter k. Shorter rows are padded on the right with label -100, which causal attention keeps
        from having any effect. Afterwards `matches` holds for each row whether the likeliest token at each label's
        position was that label, (supervised tokens,).
        """
        if len(self.shares) == 1:
            losses = self.shares[0].losses(input_ids, labels)
        elif torch.is_grad_enabled():
            parameters = [parameter for share in self.shares for parameter in share.parameters]
            losses = _SideBySide.apply(self, input_ids, labels, *parameters)
        else:
            losses = torch.cat([losses for losses, _ in self.dealt_out(input_ids, labels, gradients=False)])
        self.matches = [match for share in self.shares for match in share.matches]
        return losses


class _Share:
    """Adapters that are computed in one batch."""

    def __init__(self, base: FusedAdapters, names: Sequence[str]):
        self.base, self.matches, layers = base, (), base.decoder.layers
        ranks = [p.lora_A[n].weight.shape[0] for ps in base.modules for group in ps for p in group for n in names]
        self.adapters = {name: AdapterVectors(layers, name, max(ranks)) for name in names}
        self.parameters = [vector for own in self.adapters.values() for vector in own.vectors]
        self.scalings = [
            torch.cat(each) for each in zip(*(own.scalings for own in self.adapters.values()), strict=True)
        ]

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As `FusedAdapters.losses`, for these adapters."""
        base, (rows, tokens) = self.base, input_ids.shape
        of_layers = zip(*(own.vectors for own in self.adapters.values()), strict=True)
        vectors = [torch.cat(each) if len(each) > 1 else each[0] for each in of_layers]
        with torch.no_grad():
            x = base.decoder.embed_tokens(input_ids)
            cos, sin = base.decoder.rotary_emb(x, torch.arange(tokens, device=x.device)[None])
            cos, sin = (half[0, :, : half.shape[-1] // 2].contiguous() for half in (cos, sin))  # (T, D / 2)
            mask = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        x.requires_grad_()  # the first layers must look like the others, which share their compiled code
        if base.compiled:
            # Not only for speed: compiled for exactly 256 tokens, bfloat16 gradients of q and k are NaN on a CPU
            # (torch 2.13).
            for tensor, dimension in ((x, 1), (cos, 0), (sin, 0), (mask, 0), (mask, 1)):
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        adapters = list(zip(vectors, self.scalings, strict=True))
        for start in range(0, len(adapters), base.stride):
            inputs = start, x, cos, sin, mask, adapters[start : start + base.stride]
            x = checkpoint(base.layers, *inputs, use_reentrant=False) if base.checkpointing else base.layers(*inputs)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        supervised = targets != -100
        hidden = _norm(x[supervised], base.decoder.norm.weight.detach(), base.decoder.norm.variance_epsilon)
        each, matches = _TokenLosses.apply(hidden, base.head.detach(), targets[supervised], base.scratch(), base.few)
        self.matches = matches.split(supervised.sum(1).tolist())
        owner = torch.arange(rows, device=x.device)[:, None].expand_as(targets)[supervised]
        return torch.zeros(rows, device=x.device).index_add(0, owner, each) / supervised.sum(1)
