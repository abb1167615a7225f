"""What TransformerLens's tools ask of a model: `cfg`, weights in its shapes, honest refusals."""

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerLensConfig

from loopscope.errors import InputError
from loopscope.models.native.block import VirtualBlock
from loopscope.models.native.configuration import LoopConfig


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
