"""Several adapters over one frozen base in one pass, each with its own loss, as cheaply as the machine allows.

PEFT keeps the adapters and transformers the base; this module only computes the same losses with less work:

- the 4-bit weights never change, so where memory allows they are dequantised once (the same numbers);
- q, k and v read the same input, and so do gate and up: each set is one product, their adapters another;
- on a GPU adapters share every product with the base, a row of the batch for each, and meet nowhere else: the
  gradient of the summed loss is, adapter by adapter, the gradient of its own;
- on a CPU they share the base's memory and take turns on the cores, each computed by one thread as if it were alone:
  the same bits, and threads that wait for one another once a step; those that share a product wait at its end;
- the head runs on positions that have a label, and never holds more than a block of its logits;
- one decoder layer is compiled, not the model: every layer and every row length uses the same code.

Shapes: K adapters (one row each), T tokens, d hidden, V words of the vocabulary.
"""

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Projections of a decoder layer that read the same input."""


def _norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _adapted(x, weight, a, b):  # (K, T, in) -> (K, T, out)
    base = F.linear(x, weight)
    return torch.baddbmm(base, torch.bmm(x, a.mT), b.mT)


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


def decoder_layer(x, cos, sin, mask, norms, weights, a, b, *, heads, kv_heads, head_size, eps):
    """One Llama or Mistral layer with its adapters; (K, T, d) -> (K, T, d).

    `weights`, `a` and `b` hold one tensor for each of GROUPS: (out, in), (K, ranks, in), (K, out, ranks).
    """
    rows, tokens, _ = x.shape
    qkv = _adapted(_norm(x, norms[0], eps), weights[0], a[0], b[0]).view(rows, tokens, -1, head_size).transpose(1, 2)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    attended = _attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, mask)
    x = x + _adapted(attended.transpose(1, 2).reshape(rows, tokens, -1), weights[1], a[1], b[1])
    gate, up = _adapted(_norm(x, norms[1], eps), weights[2], a[2], b[2]).chunk(2, -1)
    return x + _adapted(F.silu(gate) * up, weights[3], a[3], b[3])


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each position and its likeliest token, the gradient computed on the way: no logits are kept."""

    @staticmethod
    def forward(ctx, hidden, head, targets, logits, wide):
        # (N, d), (V, d), (N,); scratch (block, V), (few, V) -> (N,), (N,)
        losses, likeliest = torch.empty(len(hidden), device=hidden.device), torch.empty_like(targets)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), len(logits)):
            part = slice(start, start + len(logits))
            block = torch.mm(hidden[part], head.T, out=logits[: len(hidden[part])])
            for rows, labels, loss, choice in zip(
                *(t.split(len(wide)) for t in (block, targets[part], losses[part], likeliest[part])), strict=True
            ):
                scores, labels = wide[: len(rows)].copy_(rows), labels[:, None]
                highest, found = scores.max(-1, keepdim=True)
                at_label = scores.gather(1, labels)
                choice.copy_(found[:, 0])
                total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
                loss.copy_((highest + total.log() - at_label)[:, 0])
                scores.div_(total).scatter_add_(1, labels, -torch.ones_like(total))
                rows.copy_(scores)
            torch.mm(block, head, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(likeliest)
        return losses, likeliest

    @staticmethod
    def backward(ctx, upstream, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None


class _Gathered(torch.autograd.Function):
    """The adapters' float32 parameters as the stacks that a layer reads, in its dtype, and the gradients' way back."""

    @staticmethod
    def forward(ctx, share, *parameters):
        ctx.share = share
        torch._foreach_copy_(share.places_a, list(parameters[: len(share.places_a)]))
        torch._foreach_copy_(
            share.places_b, torch._foreach_mul(list(parameters[len(share.places_a) :]), share.scalings)
        )
        return tuple(stack.detach() for stack in share.stacks)

    @staticmethod
    def backward(ctx, *gradients):
        share = ctx.share
        found = [gradients[i][where] for i, where in share.found_at]
        wide = [torch.empty(g.shape, device=g.device) for g in found]
        torch._foreach_copy_(wide, found)
        torch._foreach_mul_(wide[len(share.places_a) :], share.scalings)
        return None, *wide


class _SideBySide(torch.autograd.Function):
    """The losses of shares of one adapter, each one's forward and backward pass by itself."""

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
        Compile the layer. Nothing else changes but the last bits of a sum.
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
        shape = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "head_size": size}
        layer = partial(decoder_layer, **shape, eps=config.rms_norm_eps)
        self.plain, self.compiled = layer, torch.compile(layer, dynamic=False) if compiled else None
        self.modules = [[[layer.get_submodule(n) for n in g] for g in GROUPS] for layer in self.decoder.layers]
        self.norms = [
            (layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach())
            for layer in self.decoder.layers
        ]
        with torch.no_grad():
            self.weights = [[self._weight(group) for group in layer] for layer in self.modules] if resident else None
        cpu = self.head.device.type == "cpu"
        self.shares = [_Share(self, some) for some in ([[name] for name in names] if cpu else [names])]
        count = min(len(self.shares), torch.get_num_threads())
        self.threads = (
            ThreadPoolExecutor(count, "adapters", torch.set_num_threads, (1,)) if len(self.shares) > 1 else None
        )
        self.warm = False
        # As many logits at a time as make a full product, and of those as many as stay in a CPU's cache.
        self.block, self.few = (256, 32) if cpu else (2048, 2048)
        self.own = threading.local()
        self.matches: list[torch.Tensor] = []

    def _weight(self, group) -> torch.Tensor:
        """The base weights of a group of projections, one under the other, as the 4-bit kernel would see them."""
        layers = [module.get_base_layer() for module in group]
        parts = [
            dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            if getattr(layer.weight, "quant_state", None) is not None
            else layer.weight.detach()
            for layer in layers
        ]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.head.dtype)

    def scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This thread's, for logits."""
        if not hasattr(self.own, "scratch"):
            size, new = len(self.head), self.head.new_empty
            self.own.scratch = new(self.block, size), new(self.few, size).float()
        return self.own.scratch

    def layer(self, number: int, x, cos, sin, mask, stacks):
        """Output of one decoder layer; `stacks` hold the adapters of all layers."""
        with torch.no_grad():
            weights = self.weights[number] if self.weights else [self._weight(g) for g in self.modules[number]]
        own = stacks[8 * number : 8 * number + 8]
        inputs = x, cos, sin, mask, self.norms[number], weights, own[0::2], own[1::2]
        if self.compiled and torch.is_grad_enabled():  # a probe is too short to compile for
            try:
                return self.compiled(*inputs)
            except BackendCompilerFailed as error:
                print(
                    f"the layer could not be compiled ({str(error).splitlines()[0]}); going on without", file=sys.stderr
                )
                self.compiled = None
        return self.plain(*inputs)

    def dealt_out(self, input_ids: torch.Tensor, labels: torch.Tensor, gradients: bool) -> list[tuple]:
        """Loss of each adapter, and its gradients if wanted; as many at a time as there are threads."""
        kind = input_ids.device.type
        autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def work(share: _Share, ids: torch.Tensor, labels: torch.Tensor):
            length = int((labels != -100).nonzero()[:, 1].max()) + 1  # what pads a row is left out
            with torch.set_grad_enabled(gradients), autocast():  # neither comes along into a thread
                losses = share.losses(ids[:, :length], labels[:, :length])
            return losses.detach(), torch.autograd.grad(losses, share.parameters) if gradients else ()

        jobs = list(zip(self.shares, input_ids.split(1), labels.split(1), strict=True))
        first = []
        if gradients and not self.warm:  # what is compiled is compiled for one, while no other waits for it
            first.append(self.threads.submit(work, *jobs.pop(0)).result())
            self.warm = True
        return first + list(self.threads.map(lambda job: work(*job), jobs))

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each adapter on its own row; (K, T), (K, T) -> (K,), in nats a token.

        Row k belongs to adapter k. Shorter rows are padded on the right with label -100: causal attention keeps
        what follows a row from touching it. `matches` then holds for each row whether the likeliest token before
        each label was that label, (supervised tokens,).
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
    """Adapters that are computed in one batch, and their places in the stacks."""

    def __init__(self, base: FusedAdapters, names: Sequence[str]):
        self.base, self.names, self.matches = base, names, ()
        self._lay_out()

    def _lay_out(self) -> None:
        """Give every parameter its place in the stacks; projections of a group stand on the stack's diagonal."""
        modules, head = self.base.modules, self.base.head
        rank = max(group[0].lora_A[name].weight.shape[0] for layer in modules for group in layer for name in self.names)
        self.stacks, entries = [], {"a": [], "b": []}
        for layer in modules:
            for group in layer:
                outs = [module.get_base_layer().out_features for module in group]
                ins, device = group[0].get_base_layer().in_features, head.device
                shapes = (len(self.names), len(group) * rank, ins), (len(self.names), sum(outs), len(group) * rank)
                a, b = (torch.zeros(shape, dtype=head.dtype, device=device) for shape in shapes)
                for k, name in enumerate(self.names):
                    for j, module in enumerate(group):
                        r, low = module.lora_A[name].weight.shape[0], sum(outs[:j])
                        ranks = slice(j * rank, j * rank + r)
                        entries["a"].append((module.lora_A[name].weight, len(self.stacks), (k, ranks)))
                        where = (k, slice(low, low + outs[j]), ranks)
                        entries["b"].append(
                            (module.lora_B[name].weight, len(self.stacks) + 1, where, module.scaling[name])
                        )
                self.stacks += [a, b]
        self.parameters = [entry[0] for part in "ab" for entry in entries[part]]
        self.found_at = [entry[1:3] for part in "ab" for entry in entries[part]]
        self.places_a, self.places_b = ([self.stacks[i][where] for _, i, where, *_ in entries[part]] for part in "ab")
        self.scalings = [entry[3] for entry in entries["b"]]

    def losses(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As those of `FusedAdapters`, for these adapters."""
        base, (rows, tokens) = self.base, input_ids.shape
        stacks = _Gathered.apply(self, *self.parameters)
        with torch.no_grad():
            x = base.decoder.embed_tokens(input_ids)
            cos, sin = base.decoder.rotary_emb(x, torch.arange(tokens, device=x.device)[None])
            cos, sin = (half[0, :, : half.shape[-1] // 2].contiguous() for half in (cos, sin))  # (T, D / 2)
            mask = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        x.requires_grad_()  # one compiled layer serves all: the first is to look like the others
        if base.compiled:
            # Not for speed alone: compiled for 256 tokens and no other number, bfloat16 gradients of q and k come out
            # as NaN on a CPU (torch 2.13).
            for tensor, dimension in ((x, 1), (cos, 0), (sin, 0), (mask, 0), (mask, 1)):
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        for number in range(len(base.modules)):
            if base.checkpointing:
                x = checkpoint(base.layer, number, x, cos, sin, mask, stacks, use_reentrant=False)
            else:
                x = base.layer(number, x, cos, sin, mask, stacks)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        supervised = targets != -100
        hidden = _norm(x[supervised], base.decoder.norm.weight.detach(), base.decoder.norm.variance_epsilon)
        each, likeliest = _TokenLosses.apply(hidden, base.head.detach(), targets[supervised], *base.scratch())
        self.matches = (likeliest == targets[supervised]).split(supervised.sum(1).tolist())
        owner = torch.arange(rows, device=x.device)[:, None].expand_as(targets)[supervised]
        return torch.zeros(rows, device=x.device).index_add(0, owner, each) / supervised.sum(1)
