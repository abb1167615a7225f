"""The GPT-NeoX block: weights once, HookPoints once per virtual layer.

A `Block` owns parameters and no HookPoints; a `VirtualBlock` owns HookPoints and no parameters. A
shared block is called with another bundle of HookPoints at each iteration, so every iteration can
be read and patched by name.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from loopscope.models.hooks import Point
from loopscope.models.native.configuration import LoopConfig

Rotary = tuple[Tensor, Tensor] | None
SHORT = 512
"""Longest sequence whose attention pattern is kept whole when training in bfloat16 on a CPU."""


def rotary_tables(config: LoopConfig, n_pos: int, like: Tensor) -> Rotary:
    """Compute the cosines and sines of GPT-NeoX's partial rotary embedding, half-split convention.

    Computed in float32 for models up to float32 (as Hugging Face does, so that logits agree) and in
    float64 for float64 models.

    Args:
        config: Gives `rotary_pct`, `rotary_base` and the head width.
        n_pos: Number of positions.
        like: A tensor whose device and dtype the tables take.

    Returns:
        Two (pos, 1, d_rot) tensors, or None when nothing is rotated.
    """
    d_rot = int(config.d_head * config.rotary_pct)
    if d_rot == 0:
        return None
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, d_rot, 2, device=like.device, dtype=exact) / d_rot
    inv_freq = 1.0 / (config.rotary_base**exponent)
    angle = torch.arange(n_pos, device=like.device, dtype=exact)[:, None] * inv_freq
    angle = torch.cat((angle, angle), dim=-1)[:, None, :]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Float[Tensor, "batch pos head d_head"], rotary: Rotary) -> Tensor:
    """Apply the rotary embedding to the first d_rot dimensions of each head.

    Args:
        x: Queries or keys, (batch, pos, head, d_head).
        rotary: What `rotary_tables` gives.

    Returns:
        A tensor of the same shape; `x` itself where nothing is rotated.
    """
    if rotary is None:
        return x
    cos, sin = rotary
    d_rot = cos.shape[-1]
    turned = x[..., :d_rot]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, x[..., d_rot:]), dim=-1) if d_rot < x.shape[-1] else turned


@runtime_checkable
class NormHooks(Protocol):
    """Anything with the two HookPoints of a layer norm.

    Attributes:
        hook_scale: sqrt(var + eps) of each token, (batch, pos, 1).
        hook_normalized: The norm's output, gain and bias included.
    """

    hook_scale: HookPoint
    hook_normalized: HookPoint


class NormPoints(nn.Module):
    """HookPoints of a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_scale = Point()
        self.hook_normalized = Point()


def layer_norm(norm: nn.LayerNorm, x: Tensor, at: NormHooks) -> Tensor:
    """Apply a LayerNorm that shows its scale, sqrt(var + eps), where somebody looks at it.

    Args:
        norm: The norm's parameters.
        x: A state, (batch, pos, d_model).
        at: The HookPoints of the scale, (batch, pos, 1), and of the result.

    Returns:
        The normed state, (batch, pos, d_model).
    """
    if at.hook_scale.has_hooks():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in half
        centred = wide - wide.mean(dim=-1, keepdim=True)
        scale = (centred.pow(2).mean(dim=-1, keepdim=True) + norm.eps).sqrt()
        y = centred / at.hook_scale(scale.to(x.dtype)) * norm.weight + norm.bias
        y = y.to(x.dtype)
    else:
        y = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return at.hook_normalized(y)


def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Plain products: forward and backward of PyTorch's fused CPU kernel take twice as long.
    pos = q.shape[-2]
    mask = torch.full((pos, pos), -torch.inf, dtype=q.dtype).triu(1)
    with torch.autocast("cpu", enabled=False):
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        return (scores + mask).softmax(dim=-1) @ v


class Attention(nn.Module):
    """Causal self-attention with a fused projection, rows in Hugging Face's (head, qkv, d_head)."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.attn_bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.attn_bias)

    def forward(self, x: Tensor, at: "AttentionPoints", rotary: Rotary) -> Tensor:
        """Attend.

        Args:
            x: The normed stream, (batch, pos, d_model).
            at: The HookPoints to call.
            rotary: What `rotary_tables` gives.

        Returns:
            What is added to the stream, (batch, pos, d_model).
        """
        batch, pos, _ = x.shape
        q, k, v = self.qkv(x).view(batch, pos, self.n_heads, 3 * self.d_head).chunk(3, dim=-1)
        q, k, v = at.hook_q(q), at.hook_k(k), at.hook_v(v)
        q, k = at.hook_rot_q(rotate(q, rotary)), at.hook_rot_k(rotate(k, rotary))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if at.hook_pattern.has_hooks() or at.hook_attn_scores.has_hooks():
            scores = (q / math.sqrt(self.d_head)) @ k.transpose(-1, -2)
            future = torch.ones(pos, pos, dtype=torch.bool, device=x.device).triu(1)
            scores = at.hook_attn_scores(scores.masked_fill(future, -torch.inf))
            wide = torch.promote_types(scores.dtype, torch.float32)
            pattern = at.hook_pattern(scores.softmax(dim=-1, dtype=wide).to(v.dtype))
            z = pattern @ v
        elif self.training and pos <= SHORT and v.is_cpu and v.dtype == torch.bfloat16:
            z = _short_attention(q.to(v.dtype), k.to(v.dtype), v)
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = at.hook_z(z.transpose(1, 2))
        return self.out(z.reshape(batch, pos, -1))


class Mlp(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        assert config.d_mlp is not None
        self.up = nn.Linear(config.d_model, config.d_mlp)
        self.down = nn.Linear(config.d_mlp, config.d_model)
        self.act_fn = config.act_fn

    def forward(self, x: Tensor, at: "MlpPoints") -> Tensor:
        """Map each token.

        Args:
            x: The normed stream, (batch, pos, d_model).
            at: The HookPoints to call.

        Returns:
            What is added to the stream, (batch, pos, d_model).
        """
        pre = at.hook_pre(self.up(x))
        if self.act_fn == "gelu":
            post = F.gelu(pre)
        elif self.act_fn == "gelu_tanh":
            post = F.gelu(pre, approximate="tanh")
        else:
            post = F.relu(pre) if self.act_fn == "relu" else F.silu(pre)
        return self.down(at.hook_post(post))


class Block(nn.Module):
    """One GPT-NeoX layer: parameters only."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.d_model, eps=config.ln_eps)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.d_model, eps=config.ln_eps)
        self.mlp = Mlp(config)
        self.parallel = config.parallel_residual

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], at: "VirtualBlock", rotary: Rotary
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the layer, attention and MLP side by side or one after the other.

        Args:
            x: The residual stream, (batch, pos, d_model).
            at: The HookPoints of the virtual layer.
            rotary: What `rotary_tables` gives.

        Returns:
            The residual stream after the layer.
        """
        x = at.hook_resid_pre(x)
        attn_out = at.hook_attn_out(self.attn(layer_norm(self.ln1, x, at.ln1), at.attn, rotary))
        if self.parallel:
            mlp_out = at.hook_mlp_out(self.mlp(layer_norm(self.ln2, x, at.ln2), at.mlp))
            return at.hook_resid_post(mlp_out + attn_out + x)
        mid = at.hook_resid_mid(attn_out + x)
        mlp_out = at.hook_mlp_out(self.mlp(layer_norm(self.ln2, mid, at.ln2), at.mlp))
        return at.hook_resid_post(mlp_out + mid)

    def resumed(
        self, x: Tensor, at: "VirtualBlock", given: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the rest of the layer, given what its parts made of the same stream before.

        Args:
            x: The residual stream that enters it, (batch, pos, d_model).
            at: The HookPoints of the virtual layer.
            given: `z`, what the heads gave, or `attn_out`; and `mlp_out`, which is computed where
                it is not given (of a sequential residual it may have changed).

        Returns:
            The residual stream after the layer.
        """
        if "z" in given:
            attn_out = at.hook_attn_out(self.attn.out(at.attn.hook_z(given["z"]).flatten(2)))
        else:
            attn_out = at.hook_attn_out(given["attn_out"])
        if self.parallel:
            return at.hook_resid_post(at.hook_mlp_out(given["mlp_out"]) + attn_out + x)
        mid = at.hook_resid_mid(attn_out + x)
        if "mlp_out" in given:
            mlp_out = at.hook_mlp_out(given["mlp_out"])
        else:
            mlp_out = at.hook_mlp_out(self.mlp(layer_norm(self.ln2, mid, at.ln2), at.mlp))
        return at.hook_resid_post(mlp_out + mid)


class AttentionPoints(nn.Module):
    """HookPoints of attention, and its weights in TransformerLens's shapes."""

    hook_q: Point
    hook_k: Point
    hook_v: Point
    hook_rot_q: Point
    hook_rot_k: Point
    hook_attn_scores: Point
    hook_pattern: Point
    hook_z: Point

    def __init__(self, weights: Attention) -> None:
        super().__init__()
        for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z"):
            self.add_module(f"hook_{name}", Point())
        self._weights = (weights,)  # in a tuple, so that the parameters are not registered again

    def _qkv(self, which: int) -> tuple[Tensor, Tensor]:
        attn = self._weights[0]
        h, d = attn.n_heads, attn.d_head
        weight = attn.qkv.weight.view(h, 3, d, -1)[:, which].transpose(-1, -2)
        bias = attn.qkv.bias
        return weight, weight.new_zeros(h, d) if bias is None else bias.view(h, 3, d)[:, which]

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights."""
        return self._qkv(0)[0]

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        """Key weights."""
        return self._qkv(1)[0]

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value weights."""
        return self._qkv(2)[0]

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights."""
        attn = self._weights[0]
        return attn.out.weight.T.reshape(attn.n_heads, attn.d_head, -1)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases."""
        return self._qkv(0)[1]

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        """Key biases."""
        return self._qkv(1)[1]

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Value biases."""
        return self._qkv(2)[1]

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output biases."""
        out = self._weights[0].out
        return out.weight.new_zeros(out.out_features) if out.bias is None else out.bias


class MlpPoints(nn.Module):
    """HookPoints of the MLP, and its weights in TransformerLens's shapes."""

    def __init__(self, weights: Mlp) -> None:
        super().__init__()
        self.hook_pre = Point()
        self.hook_post = Point()
        self._weights = (weights,)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights."""
        return self._weights[0].up.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights."""
        return self._weights[0].down.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input biases."""
        return self._weights[0].up.bias

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output biases."""
        return self._weights[0].down.bias


class VirtualBlock(nn.Module):
    """HookPoints of one virtual layer, with TransformerLens's names, over a block's weights."""

    hook_out_is_single_residual_stream = True  # what TransformerLens's logit lens asks for
    hook_resid_mid: Point  # sequential residual only

    def __init__(self, weights: Block) -> None:
        super().__init__()
        self.hook_resid_pre = Point()
        self.ln1 = NormPoints()
        self.attn = AttentionPoints(weights.attn)
        self.hook_attn_out = Point()
        if not weights.parallel:
            self.hook_resid_mid = Point()
        self.ln2 = NormPoints()
        self.mlp = MlpPoints(weights.mlp)
        self.hook_mlp_out = Point()
        self.hook_resid_post = Point()
        self._weights = (weights,)

    @property
    def weights(self) -> Block:
        """The block whose parameters this virtual layer uses."""
        return self._weights[0]

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Run the block with this layer's HookPoints.

        Args:
            x: The residual stream, (batch, pos, d_model).
            rotary: What `rotary_tables` gives.

        Returns:
            The residual stream after the layer.
        """
        return self.weights(x, self, rotary)


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
        """Norm h_out.

        Args:
            x: h_out, (batch, pos, d_model).

        Returns:
            What the unembedding reads.
        """
        return layer_norm(self, x, self)
