"""What is known of a wrapped model's shape, and the regrouping of plain stacks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loopscope.errors import InputError
from loopscope.models.loops import LoopMap, Trace, regroup
from loopscope.models.native import Layout
from loopscope.models.wrapped.inputs import input_device


@dataclass(frozen=True, kw_only=True)
class WrappedConfig:
    """What is known of a wrapped model's shape.

    Attributes:
        variant: Always `wrapped`.
        layout: Depths of prelude, loops and coda, such as `2+4R8+2`.
        K: Iterations of the main loop.
        n_layers: The unrolled depth.
        d_model: Width of the state.
        d_vocab: Vocabulary size; None where the model has no embedding table.
        n_ctx: Tokens seen in training; None where unknown.
        architecture: Class of the model.
        bos_token_id: The BOS token; None where unknown.
    """

    variant: str = "wrapped"
    layout: str
    K: int
    n_layers: int
    d_model: int
    d_vocab: int | None
    n_ctx: int | None
    architecture: str
    bos_token_id: int | None = None

    @property
    def slots(self) -> None:
        """Memory slots, which only native models have."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The values, for provenance."""
        return dict(self.__dict__)


class LensConfig:
    """The values that TransformerLens's tools read from `model.cfg`.

    Type and device are the module's own at the time of asking, also after it was moved or cast.
    """

    def __init__(self, module: nn.Module, config: WrappedConfig, name: str) -> None:
        self._module = module
        self.n_layers = config.n_layers
        self.d_model = config.d_model
        self.d_vocab = config.d_vocab
        self.n_ctx = config.n_ctx
        self.model_name = name

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating parameter, or else buffer."""
        tensors = (*self._module.parameters(), *self._module.buffers())
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    @property
    def device(self) -> str:
        """Where the first parameter that has values lies, or else the first buffer."""
        return str(input_device(self._module))


def regrouped(loop_map: LoopMap, layout: str | Layout, name: str) -> LoopMap:
    """The map of a plain stack whose layers are grouped by a layout.

    Args:
        loop_map: The map of the stack.
        layout: Unshared depths, such as `4+8+8+4`.
        name: What errors call the model.

    Returns:
        The map, with the virtual blocks as iterations.

    Raises:
        InputError: if the model has a loop, or the depths do not add up.
    """
    depths = Layout.parse(layout)
    if loop_map.loops:
        raise InputError(
            f"layout groups the layers of a plain stack; {name!r} has a loop ({loop_map}). Leave "
            "the layout out."
        )
    if depths.n_layers != len(loop_map.prelude) or (depths.shared and depths.K > 1):
        raise InputError(
            f"layout {depths} does not fit: {name!r} has {len(loop_map.prelude)} unshared layers; "
            "give unshared depths P+C1+...+CK+Q that add up to it."
        )
    return regroup(loop_map, depths.prelude, depths.cores) if depths.cores else loop_map


def vocabulary_of(traced: Trace, batch: int | None, pos: int | None) -> int | None:
    """How many tokens a model knows: as it is configured, or by the table they are looked up in.

    Args:
        traced: A traced forward pass.
        batch, pos: Shape of the example's token ids.

    Returns:
        The number; None where nothing tells it.
    """
    rows = getattr(getattr(traced.modules[""], "config", None), "vocab_size", None)
    if isinstance(rows, int):
        return rows
    looked_up = [traced.modules[c.module] for c in traced.calls if (batch, pos) in c.integers]
    rows = next((m.num_embeddings for m in looked_up if isinstance(m, nn.Embedding)), None)
    if rows is None:
        rows = next((table.rows for table in traced.lookups if table.ids == (batch, pos)), None)
    return rows


def config_of(
    module: nn.Module, loop_map: LoopMap, traced: Trace, batch: int | None, pos: int | None
) -> WrappedConfig:
    """What is known of a model's shape, from its map, its configuration and its trace.

    Args:
        module: The model.
        loop_map: Its map.
        traced: A traced forward pass.
        batch, pos: Shape of the example's token ids.

    Returns:
        The configuration.
    """
    config = getattr(module, "config", None)
    main = loop_map.main
    state = main.iterations[0].h_m if main else loop_map.h_out
    context = getattr(config, "max_position_embeddings", None)
    bos = getattr(config, "bos_token_id", None)
    return WrappedConfig(
        layout=str(loop_map),
        K=loop_map.K,
        n_layers=loop_map.n_layers,
        d_model=state.shape[-1],
        d_vocab=loop_map.vocabulary or vocabulary_of(traced, batch, pos),
        n_ctx=context if isinstance(context, int) else None,
        architecture=type(module).__name__,
        bos_token_id=bos if isinstance(bos, int) else None,
    )
