"""Checkpoints with Python code of their own, written as for transformers 4."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIGURATION = """
from transformers import PretrainedConfig


class RoundConfig(PretrainedConfig):
    model_type = "round_about"

    def __init__(self, vocab_size=61, hidden_size=32, rounds=3, rope_theta=10000.0, **kwargs):
        self.vocab_size, self.hidden_size, self.rounds = vocab_size, hidden_size, rounds
        self.rope_theta, self.num_attention_heads = rope_theta, 4
        super().__init__(**kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_round import RoundConfig
{extra}

class RoundRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        freqs, self.scale = ROPE_INIT_FUNCTIONS["default"](config, None)
        self.register_buffer("inv_freq", freqs, persistent=False)

    def forward(self, x):
        angle = torch.arange(x.shape[1])[:, None] * self.inv_freq.repeat(x.shape[-1] // 4)
        return x * angle.cos()


class RoundBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        return x + torch.tanh(self.up(self.norm(x)))


class RoundForCausalLM(PreTrainedModel):
    config_class = RoundConfig
    _tied_weights_keys = {tied}

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RoundRotaryEmbedding(config)
        self.core = nn.ModuleList([RoundBlock(config), RoundBlock(config)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, config.hidden_size), persistent=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.lm_head

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=0.3)

    def forward(self, input_ids, num_steps=None, **kwargs):
        x = self.rotary(self.wte(input_ids)) * self.ramp
        for _ in range(num_steps or self.config.rounds):
            for block in self.core:
                x = block(x)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
"""


def by_hand(weights: dict[str, torch.Tensor], tokens: torch.Tensor, rounds: int) -> torch.Tensor:
    """The logits of that model, written out."""
    d = weights["wte.weight"].shape[1]
    freqs = 1.0 / 10000.0 ** (torch.arange(0, d // 4, 2).float() / (d // 4))
    angle = torch.arange(tokens.shape[1])[:, None] * freqs.repeat(d // 4)
    x = weights["wte.weight"][tokens] * angle.cos() * torch.linspace(0.5, 1.5, d)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(
            x, (d,), weights[f"{name}.weight"], weights[f"{name}.bias"]
        )

    for _ in range(rounds):
        for i in range(2):
            up = norm(x, f"core.{i}.norm") @ weights[f"core.{i}.up.weight"].T
            x = x + torch.tanh(up + weights[f"core.{i}.up.bias"])
    return norm(x, "norm") @ weights["wte.weight"].T


def write(
    folder: Path, *, tied: str = '["lm_head.weight"]', extra: str = "", **config
) -> dict[str, torch.Tensor]:
    """Write such a checkpoint; gives its weights.

    Args:
        folder: Where to.
        tied: What `_tied_weights_keys` says.
        extra: A line after the imports.
        **config: Entries of config.json that differ.
    """
    folder.mkdir(parents=True)
    (folder / "configuration_round.py").write_text(CONFIGURATION)
    (folder / "modeling_round.py").write_text(
        MODELING.replace("{tied}", tied).replace("{extra}", extra)
    )
    values = {
        "model_type": "round_about",
        "architectures": ["RoundForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_round.RoundConfig",
            "AutoModelForCausalLM": "modeling_round.RoundForCausalLM",
        },
        "tie_word_embeddings": True,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {"wte.weight": draw(61, 32)}
    for i in range(2):
        weights |= {f"core.{i}.up.weight": draw(32, 32), f"core.{i}.up.bias": draw(32)}
        weights |= {f"core.{i}.norm.weight": 1 + draw(32), f"core.{i}.norm.bias": draw(32)}
    weights |= {"norm.weight": 1 + draw(32), "norm.bias": draw(32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights
