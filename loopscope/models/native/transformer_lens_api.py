"""What TransformerLens's tools ask of a model: `cfg`, hook names, weights in its shapes."""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig

from loopscope.errors import InputError
from loopscope.models.native.block import FinalNorm, VirtualBlock
from loopscope.models.native.configuration import LoopConfig
from loopscope.names import block_name


class LensMixin:
    """`cfg`, `W_E`, `W_U`, `b_U`, `accumulated_bias` and relatives for a native model.

    Attributes:
        cfg: A TransformerLens configuration with the unrolled depth as `n_layers`.
    """

    config: LoopConfig
    cfg: TransformerLensConfig
    hook_dict: dict[str, Any]
    aliases: dict[str, str]
    embed: nn.Embedding
    ln_final: FinalNorm
    unembed: nn.Linear
    blocks: nn.ModuleList

    def _transformer_lens_config(self) -> TransformerLensConfig:
        config = self.config
        weight = self.embed.weight
        cfg = TransformerLensConfig(
            d_model=config.d_model,
            d_head=config.d_head,
            n_layers=config.layout.n_layers,
            n_ctx=config.n_ctx,
            n_heads=config.n_heads,
            d_mlp=config.d_mlp,
            d_vocab=config.d_vocab,
            device=str(weight.device),
            default_prepend_bos=False,
            positional_embedding_type="rotary",
            eps=config.ln_eps,
            act_fn=config.act_fn,
            normalization_type="LN",
            dtype=weight.dtype,
        )
        cfg.parallel_attn_mlp = config.parallel_residual
        cfg.use_attn_in = cfg.use_hook_mlp_in = False
        return cfg

    def _sync_cfg(self) -> None:
        self.cfg.device = str(self.embed.weight.device)
        self.cfg.dtype = self.embed.weight.dtype

    def mixing_boundaries(self) -> list[tuple[str, int]]:
        """Where the state is replaced by a mixture: (hook name, virtual layer it enters)."""
        config, layout = self.config, self.config.layout
        if not config.mixes:
            return []
        first = 0 if config.variant == "mesh" else 1
        entries = [(f"loop.{t}.hook_in", layout.core_start(t)) for t in range(first, config.K)]
        return [*entries, ("coda.hook_in", layout.core_start(config.K))]

    def reaches(self, name: str, stop_at_layer: int) -> bool:
        """Tell whether a run with this `stop_at_layer` gets to a hook.

        Args:
            name: The hook's canonical name.
            stop_at_layer: As in `forward`.

        Returns:
            Whether the hook is called.

        Raises:
            InputError: if the layer does not exist.
        """
        layout, stop = self.config.layout, self._stop(stop_at_layer)
        assert stop is not None
        part, _, place = name.partition(".")
        if part == "blocks":
            return int(place.split(".")[0]) < stop
        if part == "loop":
            t, _, point = place.partition(".")
            return stop >= layout.core_start(int(t) + (point != "hook_in"))
        if part == "transition":
            return stop >= layout.prelude
        if part == "coda":
            return stop >= layout.core_start(layout.K)
        return part == "hook_embed" or (part == "hook_h_out" and stop == layout.n_layers)

    def _stop(self, stop_at_layer: int | None) -> int | None:
        depth = self.config.layout.n_layers
        if stop_at_layer is None:
            return None
        stop = stop_at_layer + depth if stop_at_layer < 0 else stop_at_layer
        if not 0 <= stop <= depth:
            raise InputError(
                f"stop_at_layer={stop_at_layer} does not exist: the unrolled model has {depth} "
                f"layers; give 0 … {depth}, or -{depth} … -1."
            )
        return stop

    def unembed_state(
        self, state: Float[Tensor, "batch pos d_model"], tokens: Any = None
    ) -> Iterator[Float[Tensor, "pos d_vocab"]]:
        """Give the logits if h_out were a state, `W_U · ln_f(state)`: a logit lens.

        Args:
            state: Any state, (batch, pos, d_model).
            tokens: Not needed.

        Returns:
            (pos, d_vocab) of each sample, one after the other.
        """
        normed = self.ln_final(state)
        return (self.unembed(sample) for sample in normed)

    def unembeds_alone(self, tokens: Any) -> bool:
        """Yes: the final norm and the unembedding are modules of the model.

        Args:
            tokens: Not needed.

        Returns:
            True.
        """
        return True

    def layer_hooks(self) -> dict[str, str]:
        """Name the stream after every layer of every iteration, and the hook at which it is.

        Returns:
            `prelude.0` …, `core1.0` …, `coda.0` … → `blocks.{v}.hook_resid_post`, in order.
        """
        layout = self.config.layout
        depths = {"prelude": layout.prelude}
        depths |= {block_name(t): depth for t, depth in enumerate(layout.cores)}
        depths["coda"] = layout.coda
        names = [f"{block}.{layer}" for block, depth in depths.items() for layer in range(depth)]
        return {name: f"blocks.{v}.hook_resid_post" for v, name in enumerate(names)}

    def hook_patterns(self) -> dict[str, int]:
        """Give the hook names with the virtual layer written {v} and the iteration {t}.

        Returns:
            Pattern → how many names it stands for.
        """
        patterns: dict[str, int] = {}
        for name in self.hook_dict:
            part, _, place = name.partition(".")
            index, _, point = place.partition(".")
            if part in ("blocks", "loop") and index.isdigit():
                name = f"{part}.{{{'v' if part == 'blocks' else 't'}}}.{point}"
            patterns[name] = patterns.get(name, 0) + 1
        return patterns

    def hook_listing(self, *, every: bool = False) -> list[str]:
        """List the hook names as lines.

        Args:
            every: Each of them; otherwise patterns with how many they stand for.

        Returns:
            A heading and a line for each.
        """
        legend = "" if every else " (v: virtual layer, t: iteration; --hooks lists all)"
        lines = [f"hook names{legend}"]
        if every:
            lines += [f"  {name}" for name in self.hook_dict]
        else:
            pairs = self.hook_patterns().items()
            lines += [f"  {name:<36}{f'× {n}' if n > 1 else ''}" for name, n in pairs]
        if self.aliases:
            lines += [
                "  loop.{t}.layer.{l}.… are aliases of blocks.{v}.…, loop.{t}.hook_state of "
                "loop.{t}.hook_in:",
                "  h(t) for all that reads it (core, routers, residual); for the core alone: "
                "hook_resid_pre of its first layer",
            ]
        return lines

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Embedding matrix, before scaling."""
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding matrix."""
        return self.unembed.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias: zero in GPT-NeoX."""
        return self.unembed.weight.new_zeros(self.config.d_vocab)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum the output biases of all virtual layers before `layer`.

        Args:
            layer: A virtual layer; `cfg.n_layers` for all of them.
            mlp_input: Add the attention's of `layer` too.
            include_mlp_biases: Add the MLPs' as well as the attentions'.

        Returns:
            The sum, (d_model,).
        """
        total = self.embed.weight.new_zeros(self.config.d_model)
        blocks = [block for block in self.blocks if isinstance(block, VirtualBlock)]
        for block in blocks[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases:
                total = total + block.mlp.b_out
        if mlp_input:
            total = total + blocks[layer].attn.b_O
        return total

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Refuse: there is no input or output of one head alone that could be forked.

        Args:
            use: False changes nothing.

        Raises:
            InputError: if `use`.
        """
        if use:
            raise InputError(
                "inputs and outputs of single heads or of the MLP alone (edge attribution, direct "
                "path patching) do not exist here: the projection is fused. Patch hook_q, hook_k, "
                "hook_v or hook_z; cache.stack_head_results gives what each head writes."
            )

    set_use_attn_in = set_use_attn_result = set_use_hook_mlp_in = set_use_split_qkv_input
