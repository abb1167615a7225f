"""Ports of MeSH by other hands: backbones, slots, routers and buffers of several kinds."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loopscope.models.native.block import VirtualBlock, rotary_tables
from tests.standins.blocks import VOCAB, Block, D


class Softmax(nn.Module):
    """A router that gives weights, not what a softmax follows."""

    def __init__(self, linear):
        super().__init__()
        self.scores = linear

    def forward(self, x):
        return (x @ self.scores.weight.T + self.scores.bias).softmax(-1)


class Native(nn.Module):
    """A layer of a native model, which keeps its hooks to itself."""

    def __init__(self, block, config):
        super().__init__()
        self.block = block
        self.hidden = (VirtualBlock(block), config)

    def forward(self, x):
        at, config = self.hidden
        return self.block(x, at, rotary_tables(config, x.shape[1], x))


class Llama(nn.Module):
    """A layer of a Llama, with its rotary tables."""

    def __init__(self, layer, rotary):
        super().__init__()
        self.layer, self.rotary = layer, (rotary,)

    def forward(self, x):
        position = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None].to(x)
        tables = self.rotary[0](x, position)
        out = self.layer(x, attention_mask=mask, position_embeddings=tables)
        return out[0] if isinstance(out, tuple) else out


class Port(nn.Module):
    """MeSH (Eqs. 2-5) around any layers; `kept` is the buffer after each write of the last run.

    Args:
        embed, prelude, core, coda, norm, head: The backbone.
        routers: (write, read) matrices of the transition and of each iteration.
        query: What the transition's routers look at.
        buffer: `stack` (one tensor), `list` (a tensor per slot) or `einsum`.
        decay: What is left of the memory at each write.
        decay_at: A token; memory decays only where a text begins with it.
        temperature: Of the softmax.
        scale: Of the embeddings.
    """

    def __init__(
        self, embed, prelude, core, coda, norm, head, routers, *, query="prelude",
        buffer="stack", softmax="outside", decay=1.0, decay_at=None, temperature=1.0,
        scale=1.0,
    ):  # fmt: skip
        super().__init__()
        self.embed, self.norm, self.head = embed, norm, head
        self.prelude, self.core, self.coda = map(nn.ModuleList, (prelude, core, coda))
        self.inside = softmax == "inside"
        wrap = Softmax if self.inside else (lambda linear: linear)
        self.write = nn.ModuleList(wrap(write) for write, _ in routers)
        self.read = nn.ModuleList(wrap(read) for _, read in routers)
        self.query, self.buffer, self.temperature = query, buffer, temperature
        self.decay, self.decay_at, self.scale = decay, decay_at, scale
        self.kept: list[torch.Tensor] = []
        self.eval()

    def weights(self, router, query):
        return router(query) if self.inside else (router(query) / self.temperature).softmax(-1)

    def cycle(self, memory, value, query, t, decay):
        write, read = self.weights(self.write[t], query), self.weights(self.read[t], query)
        if self.buffer == "list":
            parts = zip(memory, write.unbind(-1), strict=True)
            memory = [m * decay + value * w[..., None] for m, w in parts]
            self.kept.append(torch.stack(memory, 1).detach())
            return memory, sum(
                m * w[..., None] for m, w in zip(memory, read.unbind(-1), strict=True)
            )
        memory = memory * decay + torch.einsum("bpd,bps->bspd", value, write)
        self.kept.append(memory.detach())
        if self.buffer == "einsum":
            return memory, torch.einsum("bspd,bps->bpd", memory, read)
        return memory, (memory * read.transpose(1, 2).unsqueeze(-1)).sum(1)

    def forward(self, tokens):
        self.kept = []
        decays = self.decay_at is None or int(tokens[0, 0]) == self.decay_at
        decay = self.decay if decays else 1.0
        h_emb = x = self.embed(tokens) * self.scale
        slots = self.write[0].scores.out_features if self.inside else self.write[0].out_features
        memory = [h_emb, *[torch.zeros_like(h_emb)] * (slots - 1)]
        memory = memory if self.buffer == "list" else torch.stack(memory, 1)
        for layer in self.prelude:
            x = layer(x)
        query = x if self.query == "prelude" else h_emb
        memory, h = self.cycle(memory, x, query, 0, decay)
        for t in range(1, len(self.write)):
            x = h
            for layer in self.core:
                x = layer(x)
            memory, h = self.cycle(memory, x, h, t, decay)
        for layer in self.coda:
            h = layer(h)
        return self.head(self.norm(h))


def noisy(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return module


def routers(K, slots, width):
    return [(nn.Linear(width, slots), nn.Linear(width, slots)) for _ in range(K + 1)]


def block_port(K=3, slots=3, *, prelude=1, core=2, coda=1, seed=0, **more):
    """A port on the stand-ins' blocks."""
    torch.manual_seed(seed)
    parts = [[Block() for _ in range(n)] for n in (prelude, core, coda)]
    ends = nn.LayerNorm(D), nn.Linear(D, VOCAB)
    return noisy(Port(nn.Embedding(VOCAB, D), *parts, *ends, routers(K, slots, D), **more), seed)


def llama_port(K=3, slots=3, *, seed=0, **more):
    """A port on layers of a Llama: one, two looped, one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=D, num_attention_heads=4, num_hidden_layers=4,
        intermediate_size=48, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    body = llama.model
    layers = [Llama(layer, body.rotary_emb) for layer in body.layers]
    parts = layers[:1], layers[1:3], layers[3:]
    made = Port(body.embed_tokens, *parts, body.norm, llama.lm_head, routers(K, slots, D), **more)
    return noisy(made, seed)


def native_port(model, **more):
    """A port with the layers, routers and weights of a native MeSH model."""
    config, mesh = model.config, model.recurrence
    parts = [[Native(block, config) for block in stack] for stack in (model.prelude, model.core)]
    coda = [Native(model.coda[i], config) for i in range(len(model.coda))]
    every = [mesh.transition, *mesh.iterations]
    return Port(
        model.embed, *parts, coda, model.ln_final, model.unembed,
        [(router.write, router.read) for router in every], query=config.transition_query,
        scale=config.d_model**0.5 if config.embed_scale else 1.0, **more,
    )  # fmt: skip
