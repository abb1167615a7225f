"""GPT-NeoX folders saved by Hugging Face (`GPTNeoXForCausalLM`, Pythia) as vanilla models."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.native.checkpoint import fill, finish, read_json, read_tensors, weight_files
from loopscope.models.native.configuration import Layout, LoopConfig
from loopscope.models.native.loop_model import LoopModel

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_TOP = {
    "gpt_neox.embed_in.weight": "embed.weight",
    "gpt_neox.final_layer_norm.weight": "ln_final.weight",
    "gpt_neox.final_layer_norm.bias": "ln_final.bias",
    "embed_out.weight": "unembed.weight",
    "lm_head.weight": "unembed.weight",
}
_LAYER = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "attention.query_key_value": "attn.qkv",
    "attention.dense": "attn.out",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
# buffers that older versions stored; they hold no weights
_IGNORED = re.compile(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|rotary_emb\.inv_freq$")


def is_gpt_neox(values: dict[str, Any]) -> bool:
    """Tell whether a Hugging Face configuration is a GPT-NeoX one.

    Args:
        values: The values of its `config.json`.

    Returns:
        Whether `model_type` says so.
    """
    return values.get("model_type") == "gpt_neox"


def config_from_hf(values: dict[str, Any], source: str) -> LoopConfig:
    """Translate a Hugging Face GPT-NeoX configuration, old keys and new.

    Args:
        values: The values of its `config.json`.
        source: Where they stand, for messages.

    Returns:
        A vanilla configuration.

    Raises:
        InputError: for what this model cannot compute (rotary scaling, other activations).
    """
    try:
        return _translate_config(values, source)
    except KeyError as err:
        raise InputError(f"{source} lacks {err}: no complete GPT-NeoX configuration.") from err
    except (TypeError, AttributeError) as err:
        raise InputError(f"{source} has a value of the wrong type: {err}.") from err


def _translate_config(values: dict[str, Any], source: str) -> LoopConfig:
    settings = [values.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    for setting in settings:
        kind = setting.get("rope_type", setting.get("type", "default"))
        if kind != "default":
            raise InputError(
                f"{source} asks for rotary embeddings of type {kind!r}; only 'default' is "
                "supported."
            )
    rope = {**settings[0], **settings[1]}
    act = values.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise InputError(
            f"{source} has hidden_act {act!r}; supported are {', '.join(_ACTIVATIONS)}."
        )
    base = rope.get("rope_theta", values.get("rotary_emb_base", 10000))
    return LoopConfig(
        variant="vanilla",
        layout=Layout.parse(str(values["num_hidden_layers"])),
        d_model=values["hidden_size"],
        n_heads=values["num_attention_heads"],
        d_vocab=values["vocab_size"],
        d_mlp=values.get("intermediate_size"),
        n_ctx=values.get("max_position_embeddings", 2048),
        rotary_pct=rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25)),
        rotary_base=float(base) if isinstance(base, int) else base,
        ln_eps=values.get("layer_norm_eps", 1e-5),
        parallel_residual=values.get("use_parallel_residual", True),
        tied_embeddings=values.get("tie_word_embeddings", False),
        attn_bias=values.get("attention_bias", True),
        act_fn=_ACTIVATIONS[act],
        embed_scale=False,
        bos_token_id=values.get("bos_token_id", 0),
        init_std=values.get("initializer_range", 0.02),
    )


def translate(name: str) -> str | None:
    """Translate the name of a Hugging Face tensor into a native model's.

    Args:
        name: Its name in the file.

    Returns:
        The native name; None for buffers without weights, an unknown name as it is.
    """
    if name in _TOP:
        return _TOP[name]
    if _IGNORED.search(name):
        return None
    match = re.fullmatch(r"gpt_neox\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"prelude.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return name  # an unknown name is kept, so that the strict check names it


def load_hf(
    folder: Path, *, name: str | None = None, dtype: torch.dtype = torch.float32
) -> LoopModel:
    """Load a folder that `GPTNeoXForCausalLM.save_pretrained` wrote, as a vanilla model.

    Args:
        folder: Holds `config.json` and `model.safetensors` (one file or sharded) or
            `pytorch_model.bin` (read with `weights_only=True`).
        name: The model's name; the folder's when not given.
        dtype: Floating type in memory.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        InputError: for missing, extra, truncated or misshapen parts, and settings not supported.
    """
    config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = {}
    for old, tensor in _read_weights(folder, dtype).items():
        new = translate(old)
        if new is not None:
            tensors[new] = tensor
    if config.tied_embeddings:
        tensors.pop("unembed.weight", None)
    with torch.device("meta"):
        model = LoopModel(config, seed=None, name=name or folder.name)
    fill(model, tensors, folder)
    finish(model, folder)
    return model


def _read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    files = weight_files(folder)
    if not files:
        raise InputError(
            f"{folder} has no weights: looked for model.safetensors, pytorch_model.bin and their "
            "indices."
        )
    read = {".safetensors": read_tensors, ".bin": _read_pickle}
    parts = [read[Path(file).suffix](folder / file, dtype) for file in files]
    return {name: tensor for part in parts for name, tensor in part.items()}


def _read_pickle(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:
        raise InputError(f"{path} cannot be read as plain tensors: {err}.") from err
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
