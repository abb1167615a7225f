"""Checkpoint folders: `config.json`, `model.safetensors`, `tokenizer.json`, `provenance.json`."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopscope.errors import InputError
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel

FORMAT, FORMAT_VERSION = "loopscope", 1
PARTS = ("config.json", "model.safetensors", "tokenizer.json", "provenance.json", "log.csv")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.

    Returns:
        The object's values by key.

    Raises:
        InputError: naming the file, if it cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise InputError(f"{path} cannot be read as JSON: {err}.") from err
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object, holds a {type(values).__name__}.")
    return values


def read_tensors(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Args:
        path: The file.
        dtype: What floating tensors are turned into.

    Returns:
        The tensors by name.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as err:
        raise InputError(
            f"{path} cannot be read: {err}. It is truncated or no safetensors file; copy or save "
            "it again."
        ) from err
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def weight_files(folder: Path) -> list[str]:
    """Name the files that hold a folder's weights, as its index tells.

    Args:
        folder: A folder in Hugging Face's layout.

    Returns:
        File names; empty where the folder has no weights.

    Raises:
        InputError: if the index names files that are not there.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return [single]
        if index.exists():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            lost = [shard for shard in shards if not (folder / shard).exists()]
            if lost or not shards:
                raise InputError(f"{folder} lacks weight files: {', '.join(lost) or 'all'}.")
            return shards
    return []


def fill(model: LoopModel, tensors: dict[str, Tensor], source: Path) -> None:
    """Give a model (on the meta device) its weights; every name and shape must fit.

    Args:
        model: A model without weights.
        tensors: Its weights by name; of tied embeddings one is enough.
        source: Where they come from, for the message.

    Raises:
        InputError: naming missing, extra and misshapen tensors.
    """
    if model.config.tied_embeddings:
        tensors.setdefault("unembed.weight", tensors.get("embed.weight", torch.empty(0)))
    if problems := _misfits(model.state_dict(), tensors):
        raise InputError(
            f"the weights in {source} do not fit {model.config.variant} {model.config.layout}; "
            + "; ".join(problems)
            + ". The configuration belongs to other weights, or the file is damaged."
        )
    model.load_state_dict(tensors, assign=True)
    if model.config.tied_embeddings:
        model.unembed.weight = model.embed.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model._sync_cfg()


def _misfits(parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """How tensors differ in names, shapes and kind from the parameters of a model."""
    missing = [n for n in parameters if n not in tensors]
    extra = [n for n in tensors if n not in parameters]
    shapes = [
        f"{n} is {tuple(tensors[n].shape)} instead of {tuple(parameters[n].shape)}"
        for n in parameters
        if n in tensors and tensors[n].shape != parameters[n].shape
    ]
    shapes += [
        f"{n} holds {str(tensors[n].dtype).removeprefix('torch.')} instead of floats"
        for n in parameters
        if n in tensors and not tensors[n].is_floating_point()
    ]
    problems = []
    for title, names in (("missing", missing), ("not expected", extra), ("misshapen", shapes)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{title}: {', '.join(names[:8])}{more}")
    return problems


def read_tokenizer(path: Path) -> Any:
    """Read a folder's tokenizer.

    Args:
        path: Its `tokenizer.json`.

    Returns:
        A `tokenizers.Tokenizer`, or None where there is no such file.

    Raises:
        InputError: if the file cannot be read.
    """
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises bare Exception
        raise InputError(f"{path} cannot be read as a tokenizer: {err}.") from err


def load_checkpoint(
    folder: Path, *, name: str | None = None, dtype: torch.dtype = torch.float32
) -> LoopModel:
    """Load a loopscope checkpoint folder; strict about every part.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        name: The model's name; the folder's when not given.
        dtype: Floating type in memory.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        InputError: for a missing, truncated, misshapen or foreign part, naming it.
    """
    config = read_config(folder)
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise InputError(f"{folder} lacks model.safetensors; the checkpoint is incomplete.")
    with torch.device("meta"):
        model = LoopModel(config, seed=None, name=name or folder.name)
    fill(model, read_tensors(weights, dtype), weights)
    finish(model, folder)
    return model


def finish(model: LoopModel, folder: Path) -> None:
    """Add the optional parts of a folder, tokenizer and provenance; evaluation mode.

    Args:
        model: A model with its weights.
        folder: The checkpoint's folder.
    """
    model.tokenizer = read_tokenizer(folder / "tokenizer.json")
    provenance = folder / "provenance.json"
    if provenance.exists():
        model.provenance = read_json(provenance)
    model.eval()


def read_config(folder: Path) -> LoopConfig:
    """Read the configuration of a checkpoint folder, its format checked.

    Args:
        folder: Holds `config.json`.

    Returns:
        The configuration.

    Raises:
        InputError: if the folder is no loopscope checkpoint, or of a version not read here.
    """
    values = read_json(folder / "config.json")
    kind = values.pop("format", None)
    if kind != FORMAT:
        actual = f"format {kind!r}" if kind is not None else "no format key"
        if "model_type" in values:
            actual = f"a Hugging Face model of type {values['model_type']!r}"
        raise InputError(
            f"{folder / 'config.json'} is no loopscope configuration ({actual}); loopscope folders "
            "and Hugging Face folders of type 'gpt_neox' can be loaded."
        )
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder / 'config.json'} has format_version {version!r}; this loopscope reads "
            f"{FORMAT_VERSION}. Update loopscope or save the checkpoint again."
        )
    return LoopConfig.from_dict(values, source=str(folder / "config.json"))


def save(
    model: LoopModel,
    folder: str | Path,
    *,
    provenance: dict[str, Any] | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder: into a temporary folder beside it, then renamed.

    Args:
        model: The model; its tokenizer goes along.
        folder: Where to; must not exist unless `overwrite`.
        provenance: Where the weights come from; the model's own when not given.
        half: Store floats in float16.
        overwrite: Replace an existing loopscope checkpoint (nothing else is ever replaced).

    Returns:
        The folder.

    Raises:
        InputError: if the folder exists and may not be replaced, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (overwrite and _is_replaceable(folder)):
        raise InputError(
            f"{folder} exists already; choose another folder"
            + (" (it is no loopscope checkpoint, so it is left alone)." if overwrite else ".")
        )
    with _written(model, folder, folder.parent, provenance, half) as temporary:
        _swap(temporary, folder)
    return folder


def save_into(
    model: LoopModel, folder: str | Path, *, provenance: dict[str, Any], half: bool = False
) -> None:
    """Write a checkpoint into a folder that holds other files too.

    Each file is whole or absent; `config.json`, which makes the folder a checkpoint, comes last.

    Args:
        model: The model; its tokenizer goes along.
        folder: Where to; made if it does not exist.
        provenance: Where the weights come from.
        half: Store floats in float16.

    Raises:
        InputError: as `save`.
    """
    folder = Path(folder)
    with _written(model, folder, folder, provenance, half) as temporary:
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)


@contextmanager
def _written(
    model: LoopModel,
    target: Path,
    parent: Path,
    provenance: dict[str, Any] | None,
    half: bool,
) -> Iterator[Path]:
    """The files of a checkpoint for `target` in a temporary folder of `parent`, gone afterwards."""
    tensors = _tensors(model, half)
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **model.config.to_dict()}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".checkpoint.", dir=parent))
    except OSError as err:
        raise InputError(f"cannot write to {parent}: {err.strerror or err}.") from err
    try:
        temporary.chmod(0o755)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, temporary / "model.safetensors")
        if model.tokenizer is not None:
            text = model.tokenizer.to_str(pretty=False)
            (temporary / "tokenizer.json").write_text(text, encoding="utf-8")
        origin = model.provenance if provenance is None else provenance
        text = json.dumps(origin, indent=2, ensure_ascii=False)
        (temporary / "provenance.json").write_text(text + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
            with path.open("rb") as file:
                os.fsync(file.fileno())
        yield temporary
    except (OSError, SafetensorError) as err:
        reason = (err.strerror if isinstance(err, OSError) else None) or err
        raise InputError(f"cannot write {target}: {reason}.") from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors(model: LoopModel, half: bool) -> dict[str, Tensor]:
    state = model.state_dict()
    if model.config.tied_embeddings:
        state.pop("unembed.weight")
    tensors = {}
    for name, tensor in state.items():
        if half and tensor.is_floating_point():
            tensor, full = tensor.to(torch.float16), tensor
            if not tensor.isfinite().all() and full.isfinite().all():
                raise InputError(f"{name} has weights beyond float16; save without half.")
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder is an empty one or a loopscope checkpoint and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or (names <= set(PARTS) and "config.json" in names)


def _swap(new: Path, folder: Path) -> None:
    """Put a finished folder in place of the old one."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / "was")
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old / "was", folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
