"""Several adapters over one frozen base in one pass, each with its own loss, as cheaply as the machine allows.

PEFT keeps the adapters, transformers keeps the base. The model's own decoder runs here, with nothing but its linear
layers replaced, so that every architecture keeps its norms, rotations, masks and biases. The losses stay the same:

- the 4-bit weights never change, so where memory allows they are dequantised once (the same numbers);
- linear layers that read the same input, such as q, k and v, are one product, and their adapters another;
- an adapter is one float32 vector per layer (`AdapterVectors`), cast and scaled when the layer runs: on the proxy, 30
  tensors to clip and step, not PEFT's 420;
- on a GPU each product with the base serves all adapters, one row of the batch each. They share nothing else, so the
  summed loss has the same gradient for an adapter as its own loss;
- on a CPU they share the base's memory, and one thread computes each adapter, with the same bits as if it trained
  alone. Threads wait for each other once a step, not after each product;
- on a GPU what is small is done for many layers at once, with the same bits, because a step waits for its launches;
- the head runs on positions that have a label, and never holds more than a block of its logits;
- decoder layers are compiled, up to three at a time, and not the whole model: layers that are alike share the compiled
  code, and so do rows of every length.

Shapes: K adapters (one row each), T tokens, d hidden, V words of the vocabulary.
"""

import copy
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from mini_symposium.errors import reason
from mini_symposium.models.devices import keep_freed_memory

ATTENTION = "mini_symposium"
"""The name of `attention` among those that a model of transformers can be told to use."""


def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
    """Attention on a CPU: (K, heads, T, D) and twice (K, kv heads, T, D) -> (K, T, heads, D), None.

    At a few hundred tokens the backward pass of fused attention is slower on a CPU than that of these products.
    """
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    rows = (query * scaling).reshape(batch * shared, heads // shared * tokens, size)  # heads that share k, stacked
    scores = torch.bmm(rows, key.reshape(batch * shared, tokens, size).mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.view(-1, tokens, tokens) + attention_mask[0], -1).view(batch * shared, -1, tokens)
    mixed = torch.bmm(weights.to(value.dtype), value.reshape(batch * shared, tokens, size))
    return mixed.view(batch, heads, tokens, size).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def sharing_copy(
    module: torch.nn.Module, config, replaced: Callable[[torch.nn.Module], torch.nn.Module | None]
) -> torch.nn.Module:
    """A copy of a module with all its tensors shared, another `config`, and those within for which `replaced` has
    another one replaced."""
    made = copy.copy(module)
    made._modules = {
        name: child and (replaced(child) or sharing_copy(child, config, replaced))
        for name, child in module._modules.items()
    }
    if hasattr(module, "config"):
        made.config = config
    return made


def fused_norm(module: torch.nn.Module) -> torch.nn.Module | None:
    """torch's own kernel for an RMS norm as llama's, two launches a step on a GPU and not 22; None for other modules.

    It rounds once where the model's rounds twice. Gemma's norms are others: they add one to their weight.
    """
    if not hasattr(module, "variance_epsilon"):
        return None
    made = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon, device="meta")
    made.weight = module.weight
    return made


class _Recorder(torch.nn.Module):
    """Stands in for a linear layer, and notes that it was called with `x`."""

    def __init__(self, layer: LoraLayer, calls: list):
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x):
        self.calls.append((x, self.layer))
        return x.new_zeros(*x.shape[:-1], self.layer.get_base_layer().out_features)


@torch.no_grad()
def linear_groups(decoder: torch.nn.Module) -> list[list[list[LoraLayer]]]:
    """The linear layers of each decoder layer in the order they run, grouped by the input that they read.

    Found by running the decoder on two tokens with stand-ins for them.
    """
    calls = []
    recording = sharing_copy(
        decoder, decoder.config, lambda module: _Recorder(module, calls) if isinstance(module, LoraLayer) else None
    )
    recording(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(decoder.parameters()).device), use_cache=False)
    number = {module: n for n, layer in enumerate(decoder.layers) for module in layer.modules()}
    by_input = [[layer for _, layer in group] for _, group in groupby(calls, key=lambda call: id(call[0]))]
    return [list(own) for _, own in groupby(by_input, key=lambda group: number[group[0]])]


class GroupWeights:
    """The frozen weights of a group of linear layers that read the same input."""

    def __init__(self, layers: Sequence[LoraLayer], dtype: torch.dtype):
        self.linears = [layer.get_base_layer() for layer in layers]
        self.width, self.outs = self.linears[0].in_features, [linear.out_features for linear in self.linears]
        biases = [linear.bias for linear in self.linears]
        self.dtype, self.bias, self.kept = dtype, None, None
        if any(bias is not None for bias in biases):
            zeros = [self.linears[0].weight.new_zeros(out, dtype=dtype) for out in self.outs]
            self.bias = torch.cat(
                [z if b is None else b.detach().to(dtype) for z, b in zip(zeros, biases, strict=True)]
            )

    def weight(self) -> torch.Tensor:
        """Their weights, stacked, (out, in), with the values that the 4-bit kernel computes with."""
        if self.kept is not None:
            return self.kept
        parts = [
            dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            if getattr(linear.weight, "quant_state", None) is not None
            else linear.weight.detach()
            for linear in self.linears
        ]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.dtype)


class LayerWeights:
    """The frozen weights of a decoder layer's groups. What is in 4 bits is laid out as one, so that three kernels, and
    not three for each linear layer, dequantise a layer; bitsandbytes' parameters become views of it.

    It takes no memory of its own, and the numbers are the same. The scales are quantised too, in blocks; where those of
    a matrix do not fill whole blocks, the layer is left as it is.
    """

    def __init__(self, groups: Sequence[GroupWeights]):
        self.groups, self.packed = groups, None
        weights = [linear.weight for group in groups for linear in group.linears]
        states = [getattr(weight, "quant_state", None) for weight in weights]
        if not all(state is not None and state.nested for state in states):
            return
        kinds = {(s.dtype, s.quant_type, s.blocksize, s.state2.blocksize) for s in states}
        [(dtype, kind, block, outer), *others] = kinds
        if others or any(s.shape.numel() % block or s.absmax.numel() % outer for s in states):
            return
        width = math.gcd(*(group.width for group in groups))
        shape = torch.Size((sum(s.shape.numel() for s in states) // width, width))
        self.packed = torch.cat([weight.data.flatten() for weight in weights])[:, None]
        self.absmax = torch.cat([s.absmax for s in states])
        absmax = torch.cat([s.state2.absmax for s in states])
        self.scales = QuantState(absmax, code=states[0].state2.code, blocksize=outer, dtype=states[0].state2.dtype)
        self.offsets = torch.cat([s.offset.expand(s.absmax.numel() // outer) for s in states])[:, None]
        self.state = partial(
            QuantState, shape=shape, code=states[0].code, blocksize=block, quant_type=kind, dtype=dtype
        )
        packed = self.packed.split([weight.numel() for weight in weights])
        absmax = self.absmax.split([s.absmax.numel() for s in states])
        for weight, own, s, scales in zip(weights, packed, states, absmax, strict=True):
            weight.data, s.absmax = own.view(weight.shape), scales

    @torch.no_grad()
    def dequantised(self) -> list[torch.Tensor]:
        """For each group its weights, stacked, (out, in)."""
        if self.packed is None:
            return [group.weight() for group in self.groups]
        scales = dequantize_blockwise(self.absmax, self.scales)
        scales.view(len(self.offsets), -1).add_(self.offsets)
        whole = dequantize_4bit(self.packed, self.state(scales.float())).to(self.groups[0].dtype).view(-1)
        parts = whole.split([sum(group.outs) * group.width for group in self.groups])
        return [part.view(-1, group.width) for part, group in zip(parts, self.groups, strict=True)]


def piece_sizes(bases: Sequence[GroupWeights], rank: int) -> list[int]:
    """Lengths of the pieces of a layer's vector: for each group all its A as one, then each B."""
    return [size for base in bases for size in (len(base.outs) * rank * base.width, *(out * rank for out in base.outs))]


class Group:
    """Linear layers that read the same input: one product with the base, and one with the adapters.

    While a decoder layer runs: `weight` (out, in) is the base's, `a` (K, ranks, in) and the scaled `b` (K, out, ranks)
    are the adapters'; `outputs` are those of all its linear layers, computed by the first.
    """

    def __init__(self, base: GroupWeights):
        self.base, self.weight, self.a, self.b, self.outputs = base, None, None, None, None

    def clear(self) -> None:
        """Let go of what the layer ran with: of its dequantised weights and its activations."""
        self.weight = self.a = self.b = self.outputs = None

    def compute(self, x: torch.Tensor) -> None:  # (K, T, in)
        if len(x) == 1:  # `bmm` would first copy `a`, because of its stride
            added = F.linear(F.linear(x, self.a.squeeze(0)), self.b.squeeze(0))
        else:
            added = torch.bmm(torch.bmm(x, self.a.mT), self.b.mT)
        self.outputs = (F.linear(x, self.weight, self.base.bias) + added).split(self.base.outs, -1)


class _Linear(torch.nn.Module):
    """Stands in for the linear layer at `place` of a group."""

    def __init__(self, group: Group, place: int):
        super().__init__()
        self.group, self.place = group, place

    def forward(self, x):
        if self.place == 0:
            self.group.compute(x)
        return self.group.outputs[self.place]


def unpack(
    bases: Sequence[GroupWeights], vectors: torch.Tensor, scalings: torch.Tensor, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The `a` and `b` of a layer's groups from its vectors, (K, length), and the projections' alpha / r, (K, n).

    The B of a group are blocks on a diagonal, so that one product computes all of them.
    """
    factors = []
    rank = vectors.shape[1] // sum(piece_sizes(bases, 1))
    pieces, scaling = iter(vectors.split(piece_sizes(bases, rank), 1)), iter(scalings.split(1, 1))
    for base in bases:
        a = next(pieces).view(-1, len(base.outs) * rank, base.width).to(dtype)
        bs = [(next(pieces).view(-1, out, rank) * next(scaling)[..., None]).to(dtype) for out in base.outs]
        factors.append((a, torch.cat([F.pad(b, (j * rank, (len(bs) - 1 - j) * rank)) for j, b in enumerate(bs)], 1)))
    return factors


def unpack_all(layers: Sequence[Sequence[GroupWeights]], vectors, scalings, dtype: torch.dtype) -> list[list[tuple]]:
    """As `unpack`, for all layers at once where they are alike: as many kernels as for one."""
    if len({tuple(piece_sizes(bases, 1)) for bases in layers}) > 1:
        return [unpack(*each, dtype) for each in zip(layers, vectors, scalings, strict=True)]
    count = len(layers)
    factors = unpack(layers[0], torch.cat(vectors), torch.cat(scalings), dtype)
    by_group = [[f.view(count, -1, *f.shape[1:]).unbind() for f in pair] for pair in factors]
    return [[(a[n], b[n]) for a, b in by_group] for n in range(count)]


def run_layers(x, layers, groups, weights, adapters, options):
    """Some decoder layers, one after the other; (K, T, d) -> (K, T, d).

    `groups`, `weights` and `adapters` have an entry per layer: of `adapters` its vectors and scalings, or what `unpack`
    made of them; `options` go to the layer's own forward pass.
    """
    for layer, own, frozen, adapter in zip(layers, groups, weights, adapters, strict=True):
        factors = adapter if isinstance(adapter, list) else unpack([group.base for group in own], *adapter, x.dtype)
        for group, weight, (a, b) in zip(own, frozen, factors, strict=True):
            group.weight, group.a, group.b = weight, a, b
        x = layer(x, **options)
        for group in own:
            group.clear()
    return x


def _any_length(tokens: int, values) -> None:
    """Tell the compiler that the tensors in `values` may have any number of tokens.

    Not only for speed: compiled for exactly 256 tokens, bfloat16 gradients of q and k are NaN on a CPU (torch 2.13).
    """
    for tensor in tree_leaves(values):
        for dimension, size in enumerate(getattr(tensor, "shape", ())):
            if size == tokens > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)


class AdapterVectors:
    """The adapter `name` as one vector for each decoder layer, laid out for `rank`.

    PEFT's parameters become views of the vectors, so that what PEFT saves, loads or computes with is what trains. If
    several are made for one adapter, the parameters view the last.

    A is (r, in), B (out, r). A vector holds, group by group (linear layers that read the same input), the A of each
    layer, then the B of each. It may be laid out for a larger rank than the adapter's, so that adapters of
    several ranks stack; what is left over stays zero, for its gradient is zero.

    Parameters
    ----------
    groups
        Of each layer of `decoder`, see `linear_groups`.

    Attributes
    ----------
    vectors : list of Tensor
        One for each layer, (1, length): the leaves that train.
    scalings : list of Tensor
        For each layer alpha / r of each linear layer, (1, n).
    """

    def __init__(self, decoder: torch.nn.Module, groups: Sequence[Sequence[Sequence[LoraLayer]]], name: str, rank: int):
        self.vectors, self.scalings, places = [], [], {}
        for number, layer in enumerate(groups):
            start = 0
            for group in layer:
                sides = [(linear.lora_A[name].weight, (rank, linear.in_features)) for linear in group]
                sides += [(linear.lora_B[name].weight, (linear.out_features, rank)) for linear in group]
                for parameter, shape in sides:
                    places[parameter] = number, start, shape
                    start += math.prod(shape)
            self.vectors.append(torch.zeros(1, start, device=parameter.device))
            scaling = [linear.scaling[name] for group in layer for linear in group]
            self.scalings.append(torch.tensor([scaling], device=parameter.device))
        # In PEFT's order, which is the order of a checkpoint's optimizer state.
        self.places = {p: places[p] for p in decoder.parameters() if p in places}
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


AHEAD = 2**27
"""Up to this many parameters of adapters, a GPU unpacks those of all layers at once. It takes some 10 bytes a parameter
and saves thousands of kernels. More are unpacked layer by layer."""
OPTIONS = {"cpp_wrapper": True}
"""For the compiler: the code that calls the kernels is compiled as well, which saves a twentieth of a step."""


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each position, and whether its label is the likeliest token. The gradient is computed in the
    forward pass, so that no logits are kept.

    Of equally likely tokens the first counts as the likeliest, as in `argmax`.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, logits, few, cap=None):
        # (N, d), (V, d), (N,); scratch (block, V); rows at a time; bound of the logits -> (N,), (N,)
        losses, matches = torch.empty(len(hidden), device=hidden.device), torch.empty_like(targets, dtype=torch.bool)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), len(logits)):
            part = slice(start, start + len(logits))
            block = torch.mm(hidden[part], head.T, out=logits[: len(hidden[part])])
            for rows, labels, loss, match in zip(
                *(t.split(few) for t in (block, targets[part], losses[part], matches[part])), strict=True
            ):
                bounded = None if cap is None else torch.tanh(rows / cap)
                shown = rows if cap is None else cap * bounded
                scores, labels = torch.log_softmax(shown, -1, dtype=torch.float32), labels[:, None]
                own = scores.gather(1, labels)
                loss.copy_(-own[:, 0])
                others = scores.scatter_(1, labels, float("-inf")).amax(-1, keepdim=True)
                match.copy_((own > others)[:, 0])
                tied = (own == others)[:, 0].nonzero()[:, 0]
                if len(tied):
                    match[tied] = labels[tied, 0] < scores[tied].argmax(-1)
                scores = scores.exp_().scatter_(1, labels, own.expm1())
                rows.copy_(scores if cap is None else scores * (1 - bounded**2))
            torch.mm(block, head, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(matches)
        return losses, matches

    @staticmethod
    def backward(ctx, upstream, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None, None


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


class _Stack(torch.nn.Module):
    """Stands in for some decoder layers that run one after the other."""

    def __init__(self, run: Callable, numbers: Sequence[int]):
        super().__init__()
        self.run, self.numbers = run, numbers

    def forward(self, x, **options):
        return self.run(self.numbers, x, options)


class FusedAdapters:
    """The losses of `names`, adapters of `model`, over its shared frozen base.

    Parameters
    ----------
    resident
        Keep the dequantised weights. Otherwise the base stays in 4 bits: each layer dequantises its own when it runs,
        and again in the backward pass.
    checkpointing
        Recompute activations in the backward pass.
    compiled
        Compile the layers, three at a time where all are alike and their number allows. Only the last bits of a sum
        change.
    kind
        Compute as on this kind of device, "cuda" or "cpu"; by default that of the model.
    """

    def __init__(
        self,
        model: PeftModel,
        names: Sequence[str],
        resident: bool = True,
        checkpointing: bool = False,
        compiled: bool = False,
        kind: str = "",
    ):
        model.train()  # in evaluation bitsandbytes rearranges the packed weights, which are read here
        base = model.get_base_model()
        self.decoder, self.head = base.get_decoder(), base.get_output_embeddings().weight
        self.config = copy.copy(base.config)
        # What the model does to its logits: granite divides them, gemma2 bounds them.
        self.divisor, self.cap = (
            getattr(base.config, key, None) for key in ("logits_scaling", "final_logit_softcapping")
        )
        self.checkpointing, self.resident = checkpointing, resident
        self.compiled = torch.compile(run_layers, dynamic=False, options=OPTIONS) if compiled else None
        # Layers compiled together: what joins two becomes one kernel. More than three would gain little.
        count, kinds = len(self.decoder.layers), set(getattr(base.config, "layer_types", None) or [""])
        self.stride = next(n for n in ((3, 2, 1) if compiled and len(kinds) == 1 else (1,)) if count % n == 0)
        cpu = (kind or self.head.device.type) == "cpu"
        self.ahead = not (cpu or compiled)
        if cpu:
            self.config._attn_implementation = ATTENTION
        self.linears = linear_groups(self.decoder)
        self.bases = [[GroupWeights(group, self.head.dtype) for group in layer] for layer in self.linears]
        with torch.no_grad():
            for group in (group for layer in self.bases for group in layer if resident):
                group.kept = group.weight()
        self.weights = [LayerWeights(layer) for layer in self.bases] if not resident else []
        if cpu:
            keep_freed_memory()  # not earlier: what dequantising leaves in pieces is given back first
        self.shares = [_Share(self, some) for some in ([[name] for name in names] if cpu else [names])]
        self.adapters = {name: own for share in self.shares for name, own in share.adapters.items()}
        count = min(len(self.shares), torch.get_num_threads())
        self.threads = (
            ThreadPoolExecutor(count, "adapters", torch.set_num_threads, (1,)) if len(self.shares) > 1 else None
        )
        self.warm = False
        # Rows of logits per product; and how many of those per softmax, so that they stay in a CPU's cache.
        self.block, self.few = (256, 16) if cpu else (2048, 2048)
        self.own = threading.local()
        self.matches: list[torch.Tensor] = []

    def scratch(self) -> torch.Tensor:
        """This thread's buffer for logits, (block, V)."""
        if not hasattr(self.own, "scratch"):
            self.own.scratch = self.head.new_empty(self.block, len(self.head))
        return self.own.scratch

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

    @torch.no_grad()
    def next_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The token that each adapter finds likeliest after its row; (K, T) -> (K,)."""
        rows = input_ids.split([len(share.adapters) for share in self.shares])
        last = [share.hidden(own)[:, -1] for share, own in zip(self.shares, rows, strict=True)]
        return (torch.cat(last) @ self.head.T).argmax(-1)


class _Share:
    """Adapters that are computed in one batch, in a decoder of their own that shares the base's tensors."""

    def __init__(self, fused: FusedAdapters, names: Sequence[str]):
        self.fused, self.matches = fused, ()
        self.held: dict[int, list[torch.Tensor]] = {}
        """The weights of each group in the layers that were dequantised last."""
        rank = max(
            linear.lora_A[n].weight.shape[0] for layer in fused.linears for g in layer for linear in g for n in names
        )
        self.adapters = {name: AdapterVectors(fused.decoder, fused.linears, name, rank) for name in names}
        self.parameters = [vector for own in self.adapters.values() for vector in own.vectors]
        self.scalings = [
            torch.cat(each) for each in zip(*(own.scalings for own in self.adapters.values()), strict=True)
        ]
        self.groups = [[Group(own) for own in layer] for layer in fused.bases]
        stand_ins = {
            linear: _Linear(group, place)
            for groups, layer in zip(self.groups, fused.linears, strict=True)
            for group, linears in zip(groups, layer, strict=True)
            for place, linear in enumerate(linears)
        }
        norm = fused_norm if fused.ahead else {}.get
        self.decoder = sharing_copy(fused.decoder, fused.config, lambda module: stand_ins.get(module) or norm(module))
        self.layers = list(self.decoder.layers)
        numbers = range(len(self.layers))
        stacks = [_Stack(self.run, numbers[start : start + fused.stride]) for start in numbers[:: fused.stride]]
        self.decoder.layers = torch.nn.ModuleList(stacks)

    def run(self, numbers: Sequence[int], x: torch.Tensor, options: dict) -> torch.Tensor:
        """Output of the decoder layers `numbers`."""
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # so that all layers run the same compiled code
            if self.fused.compiled:
                _any_length(x.shape[1], (x, options))
        adapters = [self.adapted[n] for n in numbers]
        run = partial(self._run, numbers, options=options)
        if self.fused.checkpointing:
            return checkpoint(run, x, adapters, use_reentrant=False)
        if self.fused.resident:
            return run(x, adapters)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return run(x, adapters)

    def weights(self, numbers: Sequence[int]) -> list[list[torch.Tensor]]:
        """The weights of the groups of some layers, dequantised."""
        if self.fused.resident:
            return [[group.kept for group in self.fused.bases[n]] for n in numbers]
        self.held = {n: self.held[n] for n in numbers if n in self.held}  # free the last before the next are made
        self.held |= {n: self.fused.weights[n].dequantised() for n in numbers if n not in self.held}
        return [self.held[n] for n in numbers]

    def _pack(self, tensor: torch.Tensor):
        """What autograd keeps of a tensor for the backward pass: of a dequantised weight only where it is from."""
        place = tensor.untyped_storage().data_ptr()
        for n, weights in self.held.items():
            for group, weight in enumerate(weights):
                if weight.untyped_storage().data_ptr() == place:
                    return list(self.held), n, group, tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor

    def _unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        numbers, n, group, *view = packed
        self.weights(numbers)
        return self.held[n][group].as_strided(*view)

    def _run(self, numbers: Sequence[int], x: torch.Tensor, adapters: Sequence[tuple], options: dict) -> torch.Tensor:
        fused = self.fused
        weights = self.weights(numbers)
        inputs = x, [self.layers[n] for n in numbers], [self.groups[n] for n in numbers], weights, adapters, options
        try:
            if fused.compiled and torch.is_grad_enabled():  # probes are too few to compile for
                try:
                    return fused.compiled(*inputs)
                except BackendCompilerFailed as error:
                    print(f"the layer could not be compiled ({reason(error)}); continuing without", file=sys.stderr)
                    fused.compiled = None
            return run_layers(*inputs)
        finally:  # recomputing stops at the last tensor that is needed, before `run_layers` comes to its end
            for group in (group for n in numbers for group in self.groups[n]):
                group.clear()

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the head reads; (K, T) -> (K, T, d)."""
        fused = self.fused
        of_layers = zip(*(own.vectors for own in self.adapters.values()), strict=True)
        vectors = [torch.cat(each) if len(each) > 1 else each[0] for each in of_layers]
        if fused.ahead and sum(map(torch.numel, vectors)) <= AHEAD:
            self.adapted = unpack_all(fused.bases, vectors, self.scalings, fused.head.dtype)
        else:
            self.adapted = list(zip(vectors, self.scalings, strict=True))
        hidden = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        self.adapted, self.held = [], {}
        return hidden

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As `FusedAdapters.losses`, for these adapters."""
        fused, rows, hidden = self.fused, len(input_ids), self.hidden(input_ids)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        supervised = targets != -100
        hidden = hidden[supervised] if fused.divisor is None else hidden[supervised] / fused.divisor
        each, matches = _TokenLosses.apply(
            hidden, fused.head.detach(), targets[supervised], fused.scratch(), fused.few, fused.cap
        )
        self.matches = matches.split(supervised.sum(1).tolist())
        owner = torch.arange(rows, device=hidden.device)[:, None].expand_as(targets)[supervised]
        return torch.zeros(rows, device=hidden.device).index_add(0, owner, each) / supervised.sum(1)
