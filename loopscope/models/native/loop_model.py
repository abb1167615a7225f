"""The native model: prelude, core iterations, coda, on TransformerLens's hooks."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig

from loopscope.errors import InputError, unknown_name
from loopscope.models.hooks import NamedHooks, Point
from loopscope.models.native.block import Block, VirtualBlock, layer_norm, rotary_tables
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.layout import Layout
from loopscope.models.native.recurrence import (
    LoopPoints,
    TransitionPoints,
    WeightedRecurrence,
    make_recurrence,
)
from loopscope.models.tokenization import TextMixin


class LensMixin:
    """`cfg`, `W_E`, `W_U`, `b_U`, `accumulated_bias` and relatives for a native model."""

    config: LoopConfig
    cfg: TransformerLensConfig
    embed: nn.Embedding
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
        named = [(f"loop.{t}.hook_in", layout.core_start(t)) for t in range(first, config.K)]
        return [*named, ("coda.hook_in", layout.core_start(config.K))]

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
        """Sum of the output biases of all virtual layers before `layer`."""
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
        """Refused: there is no input or output of one head alone that could be forked."""
        if use:
            raise InputError(
                "inputs and outputs of single heads or of the MLP alone (edge attribution, direct "
                "path patching) do not exist here: the projection is fused. Patch hook_q, hook_k, "
                "hook_v or hook_z; cache.stack_head_results gives what each head writes."
            )

    set_use_attn_in = set_use_attn_result = set_use_hook_mlp_in = set_use_split_qkv_input


ReturnType = Literal["logits", "loss", "both"] | None


class Stack(nn.Module):
    """Layers under the names 0, 1, …; other children may stand beside them."""

    hook_in: Point  # of the coda only

    def __init__(self, config: LoopConfig, depth: int) -> None:
        super().__init__()
        self.depth = depth
        for i in range(depth):
            self.add_module(str(i), Block(config))

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, i: int) -> Block:
        block = self._modules[str(i)]
        assert isinstance(block, Block)
        return block

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(self.depth))


class FinalNorm(nn.LayerNorm):
    """The final layer norm with its HookPoints (`ln_final.hook_scale`, `.hook_normalized`)."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__(config.d_model, eps=config.ln_eps)
        self.hook_scale = Point()
        self.hook_normalized = Point()

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(self, x, self)


class LoopModel(TextMixin, LensMixin, NamedHooks):
    """A vanilla, recursive or MeSH transformer whose every iteration is addressable by name.

    Weights live once (`prelude`, `core`, `coda`); HookPoints are unrolled: `blocks.{v}.…` over the
    virtual depth v, `loop.{t}.…` over the iterations t. `cfg` is a TransformerLens configuration
    with the unrolled depth as `n_layers`; `config` is the full `LoopConfig`.

    Args:
        config: Widths, layout and variant.
        seed: Seed of the initial weights; None leaves them uninitialised (for loading).
        name: Name shown in tables and figures; the variant when not given.
        tokenizer: A `tokenizers.Tokenizer`, needed for text input only.
    """

    def __init__(
        self,
        config: LoopConfig,
        *,
        seed: int | None = 0,
        name: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        layout = config.layout
        self.config = config
        self.tokenizer = tokenizer
        self.provenance: dict[str, Any] = {}
        self.hook_embed = Point()
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        if config.variant == "mesh":
            self.transition = TransitionPoints()
        self.loop = nn.ModuleList([LoopPoints(config) for _ in range(config.K)])
        self.prelude = Stack(config, layout.prelude)
        self.core = Stack(config, layout.n_core_params)
        self.coda = Stack(config, layout.coda)
        self.coda.add_module("hook_in", Point())
        self.blocks = nn.ModuleList([VirtualBlock(block) for block in self._unrolled()])
        self.hook_h_out = Point()
        self.ln_final = FinalNorm(config)
        self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=False)
        if config.tied_embeddings:
            self.unembed.weight = self.embed.weight
        self.recurrence = make_recurrence(config)
        if seed is not None:
            self.init_weights(seed)
        self.cfg = self._transformer_lens_config()
        self.setup()
        self.name = name or config.variant
        for t in range(config.K):
            for i in range(layout.cores[t]):
                self._alias_prefix(f"loop.{t}.layer.{i}", f"blocks.{layout.core_start(t) + i}")

    def _unrolled(self) -> Iterator[Block]:
        """Blocks in the order in which they run."""
        yield from self.prelude
        for t in range(self.config.K):
            for i in self.config.layout.core_layers(t):
                yield self.core[i]
        yield from self.coda

    def _loop_points(self) -> list[LoopPoints]:
        return [at for at in self.loop if isinstance(at, LoopPoints)]

    # -- weights ---------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights, zero biases; output projections scaled by 1/sqrt(2 N_compute).

        N_compute counts the layers of the unrolled graph (MeSH, Appendix B). Parameters that two
        variants share are drawn first and alike, so their twins start from equal weights.
        """
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        out_std = config.init_std / (2 * config.layout.n_layers) ** 0.5
        parts = (
            self.embed, self.prelude, self.core, self.coda, self.ln_final, self.unembed,
            self.recurrence,
        )  # fmt: skip
        for part in parts:
            for name, module in part.named_modules():
                if isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
                elif isinstance(module, nn.Linear | nn.Embedding):
                    if part is self.unembed and config.tied_embeddings:
                        continue
                    std = out_std if name.endswith(("attn.out", "mlp.down")) else config.init_std
                    drawn = torch.empty(module.weight.shape).normal_(std=std, generator=generator)
                    module.weight.copy_(drawn)
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        module.bias.zero_()
        if isinstance(self.recurrence, WeightedRecurrence):
            self.recurrence.reset()

    def untrained(self, seed: int = 0) -> "LoopModel":
        """The untrained twin: same configuration and tokenizer, fresh weights."""
        base = str(self.name).removesuffix("@init")
        twin = LoopModel(self.config, seed=seed, name=f"{base}@init", tokenizer=self.tokenizer)
        return twin.to(device=self.cfg.device, dtype=self.cfg.dtype)

    def with_layout(self, layout: str | Layout) -> "LoopModel":
        """The same layers grouped into other virtual blocks; weights are shared, not copied.

        Raises:
            InputError: if the model has a loop or mixes states, or the depths do not add up.
        """
        return with_layout(self, layout)

    def with_loops(self, loops: Any) -> "LoopModel":
        """The same core run another number of times; weights are shared, not copied.

        Raises:
            InputError: if the model has no shared core, or weights of its own for each iteration.
        """
        return with_loops(self, loops)

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        input: Int[Tensor, "batch pos"] | str | list[str],
        return_type: ReturnType = "logits",
        *,
        stop_at_layer: int | None = None,
        loss_per_token: bool = False,
        prepend_bos: bool = False,
    ) -> Any:
        """Run the model.

        Args:
            input: Tokens (batch, pos), or text for models with a tokenizer.
            return_type: `logits`, `loss` (mean next-token cross-entropy, nats), `both` or None.
            stop_at_layer: Return the stream (batch, pos, d_model) that enters this virtual layer
                instead; `cfg.n_layers` gives h_out, negative numbers count from the end.
            loss_per_token: Give the loss per predicted token, (batch, pos - 1).
            prepend_bos: For text: put the BOS token first.

        Returns:
            What `return_type` says: logits are (batch, pos, d_vocab).

        Raises:
            InputError: for token ids outside the vocabulary, a layer that does not exist, an
                unknown return_type, or a loss of fewer than two tokens.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(
                f"return_type must be 'logits', 'loss', 'both' or None, given {return_type!r}."
            )
        tokens = self._as_tokens(input, prepend_bos=prepend_bos)
        h_out = self._stream(tokens, self._stop(stop_at_layer))
        if stop_at_layer is not None or return_type is None:
            return h_out if stop_at_layer is not None else None
        logits = self.unembed(self.ln_final(h_out))
        if return_type == "logits":
            return logits
        loss = self._loss(logits, tokens, loss_per_token)
        return (logits, loss) if return_type == "both" else loss

    def reaches(self, name: str, stop_at_layer: int) -> bool:
        """Whether a run with this `stop_at_layer` gets to a hook (canonical name)."""
        layout, stop = self.config.layout, self._stop(stop_at_layer)
        assert stop is not None
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.split(".")[0]) < stop
        if part == "loop":
            t, _, point = rest.partition(".")
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

    def _loss(self, logits: Tensor, tokens: Tensor, per_token: bool) -> Tensor:
        if tokens.shape[1] < 2:
            raise InputError(f"a loss needs at least 2 tokens, given {tokens.shape[1]}.")
        reduction = "none" if per_token else "mean"
        flat = logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction=reduction)
        return loss.view(tokens.shape[0], -1) if per_token else loss

    def _stream(
        self, tokens: Int[Tensor, "batch pos"], stop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """h_out, or the stream entering virtual layer `stop`."""
        layout = self.config.layout
        x = self.embed(tokens)
        if self.config.embed_scale:
            x = x * self.config.d_model**0.5
        h_emb = x = self.hook_embed(x)
        rotary = rotary_tables(self.config, tokens.shape[1], x)
        last = layout.n_layers if stop is None else stop
        for v in range(layout.prelude):
            if v == last:
                return x
            x = self.blocks[v](x, rotary)
        if layout.K:
            points: Any = getattr(self, "transition", None)
            h, carry = self.recurrence.start(h_emb, x, points)
            for t, at in enumerate(self._loop_points()):
                x = h = at.hook_in(h)
                for v in range(layout.core_start(t), layout.core_start(t + 1)):
                    if v == last:
                        return x
                    x = self.blocks[v](x, rotary)
                h, carry = self.recurrence.step(t, h, at.hook_out(x), carry, at)
            x = h
        return self._coda(x, rotary, last)

    def _coda(self, h: Tensor, rotary: Any, last: int) -> Tensor:
        """h_out from the state after the loop, or the stream entering virtual layer `last`."""
        layout = self.config.layout
        x = self.coda.hook_in(h)
        for v in range(layout.n_layers - layout.coda, layout.n_layers):
            if v == last:
                return x
            x = self.blocks[v](x, rotary)
        return self.hook_h_out(x)

    def read_out(self, h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the coda makes of a state: h_out if h(K) were `h`.

        Args:
            h: Any state of the loop, (batch, pos, d_model).

        Returns:
            h_out, before the final layer norm, (batch, pos, d_model).
        """
        return self._coda(h, rotary_tables(self.config, h.shape[1], h), self.config.layout.n_layers)

    def _apply(self, *args: Any, **kwargs: Any) -> "LoopModel":
        super()._apply(*args, **kwargs)
        self._sync_cfg()
        return self

    # -- how it shows itself ---------------------------------------------------------------------

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.parameters())
        c = self.config
        return (
            f"LoopModel {self.name!r}: {c.variant} {c.layout}, K={c.K}, d_model={c.d_model}, "
            f"{c.n_heads} heads, vocabulary {c.d_vocab}, {n:,} parameters, {self.cfg.dtype}"
        )

    def _repr_html_(self) -> str:
        from loopscope.models.description import describe, to_html

        return to_html(describe(self))


def with_layout(model: LoopModel, layout: str | Layout) -> LoopModel:
    """The same layers grouped into other virtual blocks; weights are shared, not copied.

    Raises:
        InputError: if the model has a loop or mixes states, or the depths do not add up.
    """
    new = Layout.parse(layout)
    old = model.config.layout
    plain = model.config.variant in ("vanilla", "base") and not (old.shared and old.K > 1)
    if not plain:
        raise InputError(
            f"layout can regroup vanilla models only; {model.name!r} is "
            f"{model.config.variant} {old}. Leave the layout out for it."
        )
    if new.n_layers != old.n_layers or (new.shared and new.K > 1):
        raise InputError(
            f"layout {new} does not fit: {model.name!r} has {old.n_layers} unshared layers; "
            "give unshared depths P+C1+...+CK+Q that add up to it."
        )
    variant = "base" if new.shared else "vanilla"
    return _with_config(model, model.config.replace(layout=new, variant=variant))


def with_loops(model: LoopModel, loops: Any) -> LoopModel:
    """The same core run another number of times; weights are shared, not copied.

    Args:
        model: A model with a shared core whose iterations have no parameters of their own.
        loops: Iterations K, at least 1; or `{"core": K}`.

    Raises:
        InputError: if the model has no shared core, or weights of its own for each iteration.
    """
    config = model.config
    if isinstance(loops, Mapping):
        for name in loops:
            if name != "core":
                raise unknown_name("loop", name, ["core"])
        loops = loops.get("core", config.K)
    if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
        raise InputError(f"loops must be a whole number of at least 1, given {loops!r}.")
    if not config.layout.shared:
        what = "has unshared cores" if config.K else "has no loop"
        raise InputError(
            f"{model.name!r} ({config.variant} {config.layout}) {what}, so the number of "
            "iterations cannot be chosen; leave loops out."
        )
    if config.variant == "mesh":
        raise InputError(
            f"{model.name!r} (mesh {config.layout}) has routers of its own for each of its "
            f"{config.K} iterations, so it runs exactly {config.K}; leave loops out."
        )
    old = config.layout
    cores = (old.cores[0],) * loops
    layout = Layout(prelude=old.prelude, cores=cores, coda=old.coda, shared=True)
    return _with_config(model, config.replace(layout=layout))


def _with_config(model: LoopModel, config: LoopConfig) -> LoopModel:
    """A model of another configuration on the parameters of this one."""
    with torch.device("meta"):
        twin = LoopModel(config, seed=None, name=model.name, tokenizer=model.tokenizer)
    mine = [*model.prelude, *model.core, *model.coda]
    pairs: list[Any] = list(zip([*twin.prelude, *twin.core, *twin.coda], mine, strict=True))
    parts = ("embed", "ln_final", "unembed", "recurrence")
    pairs += [(getattr(twin, name), getattr(model, name)) for name in parts]
    for theirs, ours in pairs:
        trainable = [p.requires_grad for p in ours.parameters()]
        theirs.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
        for parameter, flag in zip(ours.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)  # assigning makes shared parameters trainable
    twin.provenance = model.provenance
    twin.train(model.training)
    twin._sync_cfg()
    return twin
