"""Looped models with the `generate` of transformers, whose cache has a place for each iteration."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.standins.blocks import Block


class LoopedLlama(LlamaForCausalLM):
    """A Llama whose layers run `n_loops` times, as Ouro's; each iteration has its own cache."""

    def __init__(self, layers: int = 2, n_loops: int = 3, seed: int = 0, **config) -> None:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4}
        settings = {
            **sizes,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "num_hidden_layers": layers,
            "eos_token_id": None,
            "bos_token_id": None,
            **config,
        }
        super().__init__(LlamaConfig(**settings))
        self.n_loops = n_loops
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
        self.eval()

    def start(self, e: Tensor) -> Tensor:
        """The state that the first iteration is given."""
        return e

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        return self.looped(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, self.n_loops
        )

    def looped(self, input_ids, attention_mask, position_ids, past, use_cache, steps):
        """The model with a number of iterations."""
        m = self.model
        e = m.embed_tokens(input_ids)
        if not use_cache:
            past = None
        elif past is None or not isinstance(past, Slots):
            past = Slots()
        seen = past.get_seq_length() if past is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + e.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=e,
            attention_mask=attention_mask,
            past_key_values=past,
            position_ids=position_ids,
        )
        x, rotary = self.start(e), m.rotary_emb(e, position_ids=position_ids)
        for t in range(steps):
            for number, layer in enumerate(m.layers):
                layer.self_attn.layer_idx = t * len(m.layers) + number
                x = layer(x, attention_mask=mask, position_embeddings=rotary, past_key_values=past)
        return CausalLMOutputWithPast(logits=self.lm_head(m.norm(x)), past_key_values=past)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        if generation_config.use_cache:
            model_kwargs["past_key_values"] = Slots()


class Slots(DynamicCache):
    """Keys and values of as many layers as come: one for each layer in each iteration."""


class RequestedLlama(LoopedLlama):
    """The number of iterations is an argument of forward."""

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        num_steps: int | None = None,
        **kwargs,
    ):
        steps = self.n_loops if num_steps is None else num_steps
        return self.looped(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, steps
        )


class RestlessLlama(LoopedLlama):
    """The first state is the embedding and random numbers, as in Huginn."""

    def start(self, e: Tensor) -> Tensor:
        return e + torch.randn_like(e)


class LastLogits(nn.Module):
    """A looped model that gives the logits of the last position alone, as nanoGPT does."""

    def __init__(self, n_loops: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.n_loops = n_loops
        self.embed, self.core = nn.Embedding(61, 32), Block()
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 61, bias=False)
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(self.n_loops):
            x = self.core(x)
        return self.head(self.norm(x[:, [-1]]))
