"""The native model: prelude, core iterations, coda, on TransformerLens's hooks."""

from collections.abc import Hashable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.errors import InputError, unknown_name
from loopscope.models.hooked import ParameterCount, facts_to_html
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
from loopscope.models.native.transformer_lens_api import LensMixin
from loopscope.models.tokenization import TextMixin
from loopscope.models.trajectory import Trajectory, Transition
from loopscope.names import MAIN_LOOP, block_name, state_names, twin_name

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
        name = twin_name(str(self.name))
        twin = LoopModel(self.config, seed=seed, name=name, tokenizer=self.tokenizer)
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

    def read_out(
        self, h: Float[Tensor, "batch pos d_model"], tokens: Any = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the coda makes of a state: h_out if h(K) were `h`.

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
        """Logits if h(K) were `h`, a sample at a time: of a batch they would be the largest tensor.

        Args:
            h: Any state of the loop, (batch, pos, d_model).
            tokens: Not needed.

        Returns:
            (pos, d_vocab) of each sample.
        """
        normed = self.ln_final(self.read_out(h))
        return (self.unembed(sample) for sample in normed)

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
            places = ["transition", *(f"loop.{t}" for t in range(K))]
            names += ["transition.hook_in", *(f"{at}.{point}" for at in places for point in points)]
        return names

    @torch.no_grad()
    def capture(self, tokens: Any, *, memory: bool = True, logits: bool = False) -> Trajectory:
        """Run the model once and keep the states of every iteration.

        Args:
            tokens: Token ids (batch, pos), or text for a model with a tokenizer.
            memory: Keep MeSH's buffer after each write.
            logits: Keep the logits too; otherwise they are not computed.

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
            stop_at_layer=None if logits else self.config.layout.n_layers,
        )
        assert isinstance(cache, dict)
        steps = range(self.config.K)
        h = (*(cache[f"loop.{t}.hook_in"] for t in steps), cache["coda.hook_in"])
        last = self.config.layout.prelude - 1
        prelude = cache[f"blocks.{last}.hook_resid_post"] if last >= 0 else None

        def every(point: str) -> tuple[Tensor, ...]:
            return tuple(cache[f"loop.{t}.{point}"] for t in steps)

        routing: dict[str, Any] = dict.fromkeys(("memory", "w_write", "w_read", "transition"))
        if self.config.variant == "mesh":
            routing = {
                "memory": every("hook_memory") if memory else None,
                "w_write": every("write.hook_weights"),
                "w_read": every("read.hook_weights"),
                "transition": Transition(
                    query=cache["transition.hook_in"],
                    memory=cache.get("transition.hook_memory"),
                    w_write=cache["transition.write.hook_weights"],
                    w_read=cache["transition.read.hook_weights"],
                ),
            }
        return self._trajectory(
            cache["hook_embed"], prelude, h, every("hook_out"), cache["hook_h_out"],
            logits=out if logits else None, tokens=ids, **routing,
        )  # fmt: skip

    @torch.no_grad()
    def shortened(self, longer: Trajectory, *, logits: bool = False) -> Trajectory:
        """The trajectory of this model from one with more iterations of the same core.

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
        **rest: Any,
    ) -> Trajectory:
        """A trajectory with its blocks, those without layers left out."""
        blocks = {} if prelude is None else {"prelude": (h_emb, prelude)}
        blocks |= {block_name(t): (h[t], h_m[t]) for t in range(len(h_m))}
        if self.config.layout.coda:
            blocks["coda"] = (h[-1], h_out)
        path = tuple(str(t) for t in range(len(h_m)))
        return Trajectory(h_emb=h_emb, h=h, h_m=h_m, h_out=h_out, blocks=blocks, path=path, **rest)

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
        """Facts for a reader.

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

    def hook_patterns(self) -> dict[str, int]:
        """Hook names with the virtual layer written {v} and the iteration {t}.

        Returns:
            Pattern → how many names it stands for.
        """
        patterns: dict[str, int] = {}
        for name in self.hook_dict:
            first, _, rest = name.partition(".")
            index, _, tail = rest.partition(".")
            if first in ("blocks", "loop") and index.isdigit():
                name = f"{first}.{{{'v' if first == 'blocks' else 't'}}}.{tail}"
            patterns[name] = patterns.get(name, 0) + 1
        return patterns

    def hook_listing(self, *, every: bool = False) -> list[str]:
        """Hook names as lines.

        Args:
            every: Each of them; otherwise patterns with how many they stand for.

        Returns:
            A heading and a line for each.
        """
        how = "" if every else " (v: virtual layer, t: iteration; --hooks lists all)"
        lines = [f"hook names{how}"]
        if every:
            lines += [f"  {name}" for name in self.hook_dict]
        else:
            pairs = self.hook_patterns().items()
            lines += [f"  {name:<36}{f'× {n}' if n > 1 else ''}" for name, n in pairs]
        if self.aliases:
            lines.append("  loop.{t}.layer.{l}.… are aliases of blocks.{v}.…")
        return lines

    # -- what its configuration says of it -------------------------------------------------------

    seed = None  # nothing random is drawn
    reads_out_cheaply = True
    why_no_routing = "the model has no memory slots"

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
        text = b"" if self.tokenizer is None else self.tokenizer.to_str(pretty=False).encode()
        return self.config, sha256(text).hexdigest()

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
            if name != MAIN_LOOP:
                raise unknown_name("loop", name, [MAIN_LOOP])
        loops = loops.get(MAIN_LOOP, config.K)
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
