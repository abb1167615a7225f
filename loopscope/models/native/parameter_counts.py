"""Parameter counts, from the model itself on the meta device."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.layout import Layout
from loopscope.models.native.loop_model import LoopModel


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


def model_counts(target: Any, **options: Any) -> list[dict[str, Any]]:
    """The counts of one model as a table of one row.

    Args:
        target: Whatever `load` takes.
        **options: Options of `load`.
    """
    from loopscope.models.opening.loading import load

    model = load(target, **options)
    if isinstance(model, LoopModel):
        return [_row(str(model.name), model.config, count_model(model))]
    from loopscope.models.wrapped.description import count_wrapped

    config = {key: getattr(model.config, key) for key in ("variant", "d_model", "d_vocab")}
    found = {"layout": str(model.map), **config, "slots": None}
    return [{"name": str(model.name), **found, **count_wrapped(model).to_dict()}]


def layout_counts(
    layout: str,
    *,
    variant: str | None = None,
    d_model: int | None = None,
    d_vocab: int | None = None,
    slots: int | None = None,
) -> list[dict[str, Any]]:
    """The counts of a layout as a table of one row; widths default to MeSH Table 5's."""
    parsed = Layout.parse(layout)
    config = LoopConfig(
        variant=variant or ("base" if parsed.shared else "vanilla"),
        layout=parsed,
        d_model=2048 if d_model is None else d_model,
        n_heads=1,
        d_vocab=52352 if d_vocab is None else d_vocab,
        slots=slots,
    )
    return [_row(f"{config.variant} {config.layout}", config, count_parameters(config))]


def paper_counts() -> list[dict[str, Any]]:
    """The rows of `paper_table` as plain values."""
    return [_row(*row) for row in paper_table()]


def _row(name: str, config: LoopConfig, count: ParameterCount) -> dict[str, Any]:
    return {
        "name": name, "layout": str(config.layout), "variant": config.variant,
        "d_model": config.d_model, "d_vocab": config.d_vocab, "slots": config.slots,
        **count.to_dict(),
    }  # fmt: skip


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
