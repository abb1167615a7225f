"""Stamps: what tells whether a result is still that of these weights and this text."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loopscope.models.load import locate, zoo_folder

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".csv")


def stamp_of_target(target: str | Path, *, trust_remote_code: bool) -> dict[str, Any] | None:
    """Names, sizes and times of a checkpoint's files, and the seed of an untrained twin.

    Args:
        target: What `load` takes.
        trust_remote_code: As in `load`.

    Returns:
        JSON values; None for a factory, whose weights are known only when it was called.
    """
    found = locate(target, trust_remote_code=trust_remote_code)
    if found.kind == "factory":
        return None
    files = {}
    for path in sorted(Path(found.place).iterdir()):
        ignored = path.name.startswith(".") or (found.untrained and path.suffix in _WEIGHTS)
        if path.is_file() and not ignored:
            told = path.stat()
            files[path.name] = [told.st_size, told.st_mtime_ns]
    return {"folder": str(Path(found.place).resolve()), "files": files}


def stamp_of_model(model: Any) -> dict[str, Any]:
    """A hash of a model's weights and code.

    Args:
        model: A native or wrapped model. Of its code the files that define its modules are seen,
            and of classes without a file (in a notebook) the compiled `forward`.

    Returns:
        JSON values.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type};".encode())
        if tensor.device.type != "meta":
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(plain.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    kinds = {type(module) for module in model.modules()}
    for kind in sorted(kinds, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        digest.update(f"{kind.__module__}.{kind.__qualname__};".encode())
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if kind.__module__.partition(".")[0] in ("torch", "loopscope"):
            continue  # their versions are recorded
        if file is not None and Path(file).is_file():
            digest.update(Path(file).read_bytes())
        elif (code := getattr(kind.forward, "__code__", None)) is not None:
            digest.update(code.co_code + repr(code.co_names).encode())
    config, found = model.config, getattr(model, "map", None)
    told = config.to_dict() if hasattr(config, "to_dict") else str(config)
    mapped = None if found is None else found.to_dict()
    digest.update(json.dumps([told, mapped], sort_keys=True, default=str).encode())
    tokenizer = getattr(model, "tokenizer", None)
    digest.update(b"" if tokenizer is None else tokenizer.to_str().encode())
    digest.update(f"{getattr(model, 'seed', None)} {model.training}".encode())
    return {"sha256": digest.hexdigest()}


def stamp_of_data(data: str | Path | None) -> str:
    """A hash of the text, or of the shipped held-out samples."""
    return _of_file(zoo_folder() / "heldout.parquet" if data is None else Path(data))


def stamp_of_spec(spec: Any) -> Any:
    """What a specification says, as JSON values or a hash of its file."""
    if spec is None or isinstance(spec, Mapping):
        return spec
    return _of_file(Path(spec))


def _of_file(path: Path) -> str:
    try:
        with path.expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return f"{path} cannot be read"  # whoever reads it says so


__all__ = ["stamp_of_data", "stamp_of_model", "stamp_of_spec", "stamp_of_target"]
