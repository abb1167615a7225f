"""Parameter counts, from the model itself on the meta device."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from loopscope.models.config import LoopConfig
from loopscope.models.layout import Layout
from loopscope.models.model import LoopModel


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: All parameters, shared ones once.
        non_embedding: Without the embedding and the unembedding, with the final layer norm.
        router: Those of MeSH's routers: (K + 1) · 2 · B · (D + 1).
    """

    total: int
    non_embedding: int
    router: int

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return asdict(self)


def count_parameters(config: LoopConfig) -> ParameterCount:
    """Count the parameters of a configuration without allocating them."""
    with torch.device("meta"):
        return count_model(LoopModel(config, seed=None))


def count_model(model: LoopModel) -> ParameterCount:
    """Count the parameters of a model."""
    total = sum(p.numel() for p in model.parameters())
    ends = {id(p): p.numel() for p in (model.embed.weight, model.unembed.weight)}
    router = 0
    if model.config.variant == "mesh":
        router = sum(p.numel() for p in model.recurrence.parameters())
    return ParameterCount(total=total, non_embedding=total - sum(ends.values()), router=router)


def paper_table() -> list[tuple[str, LoopConfig, ParameterCount]]:
    """The rows of MeSH Table 5 (D = 2048, vocabulary padded to 52352) and Pythia's sizes."""
    loop = Layout.parse("4+8R2+4")
    big: dict[str, Any] = {"d_model": 2048, "n_heads": 16, "d_vocab": 52352}
    rows: list[tuple[str, LoopConfig]] = [
        ("vanilla 24", LoopConfig(variant="vanilla", layout=Layout.parse("24"), **big)),
        ("recursive 4+8R2+4", LoopConfig(variant="base", layout=loop, **big)),
        ("+mesh 4+8R2+4", LoopConfig(variant="mesh", layout=loop, **big)),
    ]
    for label, (layers, width, heads, vocab) in PYTHIA.items():
        config = LoopConfig(
            variant="vanilla",
            layout=Layout(prelude=layers),
            d_model=width,
            n_heads=heads,
            d_vocab=vocab,
        )
        rows.append((f"pythia-{label}", config))
    return [(label, config, count_parameters(config)) for label, config in rows]


PYTHIA = {  # layers, width, heads, vocabulary
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}
