"""The native model: prelude, core iterations, coda, on TransformerLens's hooks."""

from collections.abc import Hashable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.errors import InputError, unknown_name
from loopscope.models.generation import GenerationMixin, last_logits
from loopscope.models.hooked import LayerParts, ParameterCount, facts_to_html
from loopscope.models.hooks import NamedHooks, Point
from loopscope.models.native.block import Block, FinalNorm, Stack, VirtualBlock, rotary_tables
from loopscope.models.native.configuration import Layout, LoopConfig
from loopscope.models.native.recurrence import (
    LoopPoints,
    TransitionPoints,
    WeightedRecurrence,
    make_recurrence,
)
from loopscope.models.native.resuming import StreamMixin
from loopscope.models.native.transformer_lens_api import LensMixin
from loopscope.models.tokenization import TextMixin
from loopscope.models.trajectory import Trajectory, Transition
from loopscope.names import MAIN_LOOP, block_name, state_names, twin_name
from loopscope.text import tokenizer_stamp

ReturnType = Literal["logits", "loss", "both"] | None


class LoopModel(GenerationMixin, TextMixin, LensMixin, StreamMixin, NamedHooks):
    """A vanilla, recursive or MeSH transformer whose every iteration is addressable by name.

    Weights live once (`prelude`, `core`, `coda`); HookPoints are unrolled: `blocks.{v}.…` over the
    virtual depth v, `loop.{t}.…` over the iterations t. A patch of `loop.{t}.hook_in`, also named
    `hook_state`, reaches all that reads h(t) (core, routers, supplements), one of the first layer's
    `hook_resid_pre` the core alone; in wrapped models `hook_in` is the core's alone too. `cfg` is a
    TransformerLens configuration with the unrolled depth as `n_layers`; `config` is the full
    `LoopConfig`.

    Args:
        config: Widths, layout and variant.
        seed: Seed of the initial weights; None leaves them uninitialised (for loading).
        name: Name shown in tables and figures; the variant when not given.
        tokenizer: A `tokenizers.Tokenizer`, needed for text input only.

    Attributes:
        provenance: Where the weights come from; empty for fresh ones.
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
            self.aliases[f"loop.{t}.hook_state"] = f"loop.{t}.hook_in"
            self.mod_dict[f"loop.{t}.hook_state"] = self.mod_dict[f"loop.{t}.hook_in"]

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

        Args:
            seed: Of the random numbers.
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
        """Make the untrained twin: same configuration and tokenizer, fresh weights.

        Args:
            seed: Of its weights.

        Returns:
            The twin, on the same device and in the same dtype.
        """
        name = twin_name(str(self.name))
        twin = LoopModel(self.config, seed=seed, name=name, tokenizer=self.tokenizer)
        return twin.to(device=self.cfg.device, dtype=self.cfg.dtype)

    def with_layout(self, layout: str | Layout) -> "LoopModel":
        """Group the same layers into other virtual blocks; weights are shared, not copied.

        Args:
            layout: Unshared depths `P+C1+...+CK+Q` that add up to the model's layers.

        Returns:
            A model on the same parameters.

        Raises:
            InputError: if the model has a loop or mixes states, or the depths do not add up.
        """
        new = Layout.parse(layout)
        old = self.config.layout
        plain = self.config.variant in ("vanilla", "base") and not (old.shared and old.K > 1)
        if not plain:
            raise InputError(
                f"layout can regroup vanilla models only; {self.name!r} is "
                f"{self.config.variant} {old}. Leave the layout out for it."
            )
        if new.n_layers != old.n_layers or (new.shared and new.K > 1):
            raise InputError(
                f"layout {new} does not fit: {self.name!r} has {old.n_layers} unshared layers; "
                "give unshared depths P+C1+...+CK+Q that add up to it."
            )
        variant = "base" if new.shared else "vanilla"
        return _with_config(self, self.config.replace(layout=new, variant=variant))

    def with_loops(self, loops: Any) -> "LoopModel":
        """Run the same core another number of times; weights are shared, not copied.

        Args:
            loops: Iterations K, at least 1; or `{"core": K}`.

        Returns:
            A model on the same parameters.

        Raises:
            UnknownNameError: for a loop that is not `core`.
            InputError: if the model has no shared core, or weights of its own for each iteration.
        """
        config = self.config
        if isinstance(loops, Mapping):
            for name in loops:
                if name != MAIN_LOOP:
                    raise unknown_name("loop", name, [MAIN_LOOP])
            loops = loops.get(MAIN_LOOP, config.K)
        if isinstance(loops, bool) or not isinstance(loops, int) or loops < 1:
            raise InputError(f"loops must be a whole number of at least 1, given {loops!r}.")
        if not config.layout.shared:
            problem = "has unshared cores" if config.K else "has no loop"
            raise InputError(
                f"{self.name!r} ({config.variant} {config.layout}) {problem}, so the number of "
                "iterations cannot be chosen; leave loops out."
            )
        if config.variant == "mesh":
            raise InputError(
                f"{self.name!r} (mesh {config.layout}) has routers of its own for each of its "
                f"{config.K} iterations, so it runs exactly {config.K}; leave loops out."
            )
        old = config.layout
        cores = (old.cores[0],) * loops
        layout = Layout(prelude=old.prelude, cores=cores, coda=old.coda, shared=True)
        return _with_config(self, config.replace(layout=layout))

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

    def _next_logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        return last_logits(self(tokens, **kwargs), tokens, self.name)

    def _loss(self, logits: Tensor, tokens: Tensor, per_token: bool) -> Tensor:
        if tokens.shape[1] < 2:
            raise InputError(f"a loss needs at least 2 tokens, given {tokens.shape[1]}.")
        reduction = "none" if per_token else "mean"
        flat = logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction=reduction)
        return loss.view(tokens.shape[0], -1) if per_token else loss

    def read_out(
        self, h: Float[Tensor, "batch pos d_model"], tokens: Any = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Tell what the coda makes of a state: h_out if h(K) were `h`.

        Args:
            h: Any state of the loop, (batch, pos, d_model).
            tokens: Not needed: the coda sees nothing but the state.

        Returns:
            h_out, before the final layer norm, (batch, pos, d_model).
        """
        return self._coda(h, rotary_tables(self.config, h.shape[1], h), self.config.layout.n_layers)

    def read_out_logits(
        self, h: Float[Tensor, "batch pos d_model"], tokens: Any = None
    ) -> Iterator[Float[Tensor, "pos d_vocab"]]:
        """Give the logits if h(K) were `h`, by sample: a batch's would be the largest tensor.

        Args:
            h: Any state of the loop, (batch, pos, d_model).
            tokens: Not needed.

        Returns:
            (pos, d_vocab) of each sample.
        """
        normed = self.ln_final(self.read_out(h))
        return (self.unembed(sample) for sample in normed)

    def coda_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the coda and of the final layer norm, by name."""
        parts = ("coda.", "ln_final.")
        return {name: value for name, value in self.named_parameters() if name.startswith(parts)}

    # -- what a trajectory is made of ------------------------------------------------------------

    def state_hooks(self, *, memory: bool = True) -> list[str]:
        """Name the hooks that a trajectory is read from.

        Args:
            memory: Whether MeSH's buffer is wanted.

        Returns:
            Canonical hook names.
        """
        layout, K = self.config.layout, self.config.K
        names = ["hook_embed", "coda.hook_in", "hook_h_out"]
        if layout.prelude:
            names.append(f"blocks.{layout.prelude - 1}.hook_resid_post")
        for t in range(K):
            names += [f"loop.{t}.hook_in", f"loop.{t}.hook_out"]
        if self.config.variant == "mesh":
            points = ["write.hook_weights", "read.hook_weights"]
            points += ["hook_memory"] if memory else []
            cycles = ["transition", *(f"loop.{t}" for t in range(K))]
            names += ["transition.hook_in", *(f"{at}.{point}" for at in cycles for point in points)]
        return names

    @torch.no_grad()
    def capture(
        self, tokens: Any, *, memory: bool = True, logits: bool = False, output: bool = False
    ) -> Trajectory:
        """Run the model once and keep the states of every iteration.

        Args:
            tokens: Token ids (batch, pos), or text for a model with a tokenizer.
            memory: Keep MeSH's buffer after each write.
            logits: Keep the logits too; otherwise they are not computed.
            output: Keep what the model returns: the logits.

        Returns:
            The trajectory; its tensors carry no gradients.

        Raises:
            InputError: for tokens the model cannot take.
        """
        ids = self._as_tokens(tokens)
        out, cache = self.run_with_cache(
            ids,
            names_filter=self.state_hooks(memory=memory),
            return_cache_object=False,
            stop_at_layer=None if logits or output else self.config.layout.n_layers,
        )
        assert isinstance(cache, dict)
        h = (*self._of_iterations(cache, "hook_in"), cache["coda.hook_in"])
        last = self.config.layout.prelude - 1
        prelude = cache[f"blocks.{last}.hook_resid_post"] if last >= 0 else None
        return self._trajectory(
            cache["hook_embed"], prelude, h, self._of_iterations(cache, "hook_out"),
            cache["hook_h_out"], logits=out if logits else None, tokens=ids,
            output=out if output else None,
            **self._routing(cache, memory=memory),
        )  # fmt: skip

    def _of_iterations(self, cache: dict[str, Tensor], point: str) -> tuple[Tensor, ...]:
        """What was cached at one hook of each iteration."""
        return tuple(cache[f"loop.{t}.{point}"] for t in range(self.config.K))

    def _routing(self, cache: dict[str, Tensor], *, memory: bool) -> dict[str, Any]:
        """The fields of a trajectory that only MeSH has."""
        if self.config.variant != "mesh":
            return dict.fromkeys(("memory", "w_write", "w_read", "transition"))
        return {
            "memory": self._of_iterations(cache, "hook_memory") if memory else None,
            "w_write": self._of_iterations(cache, "write.hook_weights"),
            "w_read": self._of_iterations(cache, "read.hook_weights"),
            "transition": Transition(
                query=cache["transition.hook_in"],
                memory=cache.get("transition.hook_memory"),
                w_write=cache["transition.write.hook_weights"],
                w_read=cache["transition.read.hook_weights"],
            ),
        }

    @torch.no_grad()
    def shortened(self, longer: Trajectory, *, logits: bool = False) -> Trajectory:
        """Make the trajectory of this model from one with more iterations of the same core.

        Both pass through the same states up to h(K), since nothing in the core knows K; only the
        coda is run anew. Neither model may have hooks.

        Args:
            longer: What `with_loops(T).capture` gives, T ≥ K.
            logits: Keep the logits too.

        Returns:
            What `capture(longer.tokens, logits=logits)` gives.
        """
        K = self.config.K
        h = longer.h[: K + 1]
        h_out = self.read_out(h[K])
        _, prelude = longer.blocks.get("prelude", (None, None))
        return self._trajectory(
            longer.h_emb, prelude, h, longer.h_m[:K], h_out, memory=None, w_write=None,
            w_read=None, transition=None, tokens=longer.tokens,
            logits=self.unembed(self.ln_final(h_out)) if logits else None,
        )  # fmt: skip

    def _trajectory(
        self,
        h_emb: Tensor,
        prelude: Tensor | None,
        h: tuple[Tensor, ...],
        h_m: tuple[Tensor, ...],
        h_out: Tensor,
        **further: Any,
    ) -> Trajectory:
        """A trajectory with its blocks, those without layers left out."""
        blocks = {} if prelude is None else {"prelude": (h_emb, prelude)}
        blocks |= {block_name(t): (h[t], h_m[t]) for t in range(len(h_m))}
        if self.config.layout.coda:
            blocks["coda"] = (h[-1], h_out)
        path = tuple(str(t) for t in range(len(h_m)))
        return Trajectory(
            h_emb=h_emb, h=h, h_m=h_m, h_out=h_out, blocks=blocks, path=path, **further
        )

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
        return facts_to_html(self.describe())

    def describe(self) -> dict[str, Any]:
        """Give facts for a reader.

        Returns:
            Name, variant, layout, widths, parameter counts, memory slots, the roles of the virtual
            layers, the states a trajectory has, and what the model was trained on, if known.
        """
        config, layout, counts = self.config, self.config.layout, self.counts()
        facts: dict[str, Any] = {
            "name": self.name,
            "variant": config.variant,
            "layout": str(layout),
            "iterations K": config.K,
            "layers": f"{layout.n_param_layers} of parameters, {layout.n_layers} of compute",
            "width": f"d_model {config.d_model}, {config.n_heads} heads, d_mlp {config.d_mlp}",
            "vocabulary": config.d_vocab,
            "context": config.n_ctx,
            "parameters": f"{counts.total:,} ({counts.non_embedding:,} non-embedding)",
        }
        if config.variant == "mesh":
            facts["memory"] = (
                f"{config.slots} slots, {counts.router:,} router parameters, transition looks at "
                f"the {config.transition_query}"
            )
        facts["roles"] = "; ".join(
            f"{role}: blocks {start}…{start + depth - 1}" if depth > 1 else f"{role}: block {start}"
            for role, start, depth in layout.roles()
        )
        facts["states"] = ", ".join(["h_emb", *state_names(config.K), "h_out"])
        facts["dtype, device"] = f"{str(self.cfg.dtype).removeprefix('torch.')}, {self.cfg.device}"
        facts["tokenizer"] = "yes" if self.tokenizer is not None else "none: token ids only"
        if self.provenance.get("untrained"):
            facts["training"] = f"none (untrained twin, seed {self.provenance.get('seed')})"
        elif isinstance(self.provenance.get("tokens"), int):
            facts["training"] = f"{self.provenance['tokens']:,} tokens"
        return facts

    def counts(self) -> ParameterCount:
        """Count the parameters, shared and tied ones once.

        Returns:
            All, those outside embedding and unembedding, and those of MeSH's routers.
        """
        total = sum(p.numel() for p in self.parameters())
        ends = {id(p): p.numel() for p in (self.embed.weight, self.unembed.weight)}
        mesh = self.config.variant == "mesh"
        return ParameterCount(
            total=total,
            non_embedding=total - sum(ends.values()),
            router=sum(p.numel() for p in self.recurrence.parameters()) if mesh else 0,
        )

    # -- what its configuration says of it -------------------------------------------------------

    seed = None  # nothing random is drawn
    reads_out_cheaply = True
    why_no_routing = "the model has no memory slots"
    coda_hook, output_type = "coda.hook_in", "logits"
    slots_take_hooks = True

    def layer_parts(self, path: str) -> tuple[LayerParts, ...]:
        """Name the hooks of attention, MLP and heads of each layer in one iteration.

        Args:
            path: The iteration, `0` … `K-1`.

        Returns:
            The parts of each layer, in order.
        """
        start = self.config.layout.core_start(int(path))
        end = self.config.layout.core_start(int(path) + 1)
        return tuple(
            LayerParts(
                attention=(f"blocks.{v}.hook_attn_out",),
                mlp=(f"blocks.{v}.hook_mlp_out",),
                z=f"blocks.{v}.attn.hook_z",
                heads=self.config.n_heads,
                shaped=True,
            )
            for v in range(start, end)
        )

    @property
    def K(self) -> int:
        """Iterations of the core."""
        return self.config.K

    @property
    def loops(self) -> dict[str, int]:
        """Iterations of the core by its name; empty without one."""
        return {MAIN_LOOP: self.K} if self.K else {}

    @property
    def is_plain(self) -> bool:
        """Whether no layer runs twice, so that a layout may group them into virtual blocks."""
        return self.config.variant == "vanilla"

    def twin_key(self) -> Hashable:
        """Configuration and tokenizer: what decides an untrained twin."""
        return self.config, sha256(tokenizer_stamp(self.tokenizer)).hexdigest()

    def why_no_loss(self) -> str:
        """Nothing: a native model predicts next tokens."""
        return ""

    def structure(self) -> dict[str, Any]:
        """Nothing besides the configuration."""
        return {}

    def specification(self) -> str:
        """Nothing besides the configuration."""
        return ""

    def outline(self) -> None:
        """Nothing besides the configuration."""

    def code_entries(self) -> list[tuple[nn.Module, str]]:
        """The methods through which all of the model's own code is entered."""
        return [(self, "forward"), (self, "read_out"), (self, "unembed")]


def _with_config(model: LoopModel, config: LoopConfig) -> LoopModel:
    """A model of another configuration on the parameters of this one."""
    with torch.device("meta"):
        view = LoopModel(config, seed=None, name=model.name, tokenizer=model.tokenizer)
    layers = [*model.prelude, *model.core, *model.coda]
    pairs: list[Any] = list(zip([*view.prelude, *view.core, *view.coda], layers, strict=True))
    parts = ("embed", "ln_final", "unembed", "recurrence")
    pairs += [(getattr(view, name), getattr(model, name)) for name in parts]
    for target, source in pairs:
        trainable = [p.requires_grad for p in source.parameters()]
        target.load_state_dict(source.state_dict(keep_vars=True), assign=True)
        for parameter, flag in zip(source.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)  # assigning makes shared parameters trainable
    view.provenance = model.provenance
    view.train(model.training)
    view._sync_cfg()
    return view
