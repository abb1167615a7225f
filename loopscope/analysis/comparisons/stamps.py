"""Stamps: what tells whether a result is still that of these weights and this text."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any
from uuid import uuid4

import torch

from loopscope.analysis.measuring import Items
from loopscope.models import Hooked
from loopscope.models.loops import is_packed
from loopscope.models.opening import locate, zoo_folder
from loopscope.text import tokenizer_stamp

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".csv")


def stamp_of_target(target: str | Path, *, trust_remote_code: bool) -> dict[str, Any] | None:
    """Names, sizes and times of a checkpoint's files, and the seed of an untrained twin.

    Args:
        target: What `load` takes.
        trust_remote_code: As in `load`.

    Returns:
        JSON values; None for a factory, whose weights are known only when it was called.
    """
    source = locate(target, trust_remote_code=trust_remote_code)
    if source.kind == "factory":
        return None
    folder, files = Path(source.place), {}
    for path in sorted(folder.iterdir()):
        ignored = path.name.startswith(".") or (source.untrained and path.suffix in _WEIGHTS)
        if path.is_file() and not ignored:
            status = path.stat()
            files[path.name] = [status.st_size, status.st_mtime_ns]
    return {"folder": str(folder.resolve()), "files": files}


def stamp_of_model(model: Hooked) -> dict[str, Any]:
    """Hash what a model computes with: weights, buffers, settings and code.

    Args:
        model: A native or wrapped model. Of its code the files that define its modules are seen,
            with what else was imported from their folders, and of classes without a file (in a
            notebook) the compiled methods. A model with hooks equals no other.

    Returns:
        JSON values.
    """
    digest = hashlib.sha256()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type};".encode())
        if tensor.device.type != "meta":
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(plain.view(torch.uint8).numpy()))
    for name, module in model.named_modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)}
        if is_packed(module):  # quantised weights are neither parameters nor buffers
            digest.update(_packed_bytes(module))
        digest.update(f"{name} {sorted(settings.items())};".encode())
    if any(part._forward_hooks or part._forward_pre_hooks for part in _hooked(model)):
        digest.update(uuid4().bytes)  # what hooks do is not to be seen
    for code in _code({type(module) for module in model.modules()}):
        digest.update(code)
    facts = [model.config.to_dict(), model.structure()]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(tokenizer_stamp(model.tokenizer))
    digest.update(str(model.seed).encode())
    return {"sha256": digest.hexdigest()}


def _packed_bytes(part: Any) -> bytes:
    """The values of a packed matrix and its bias."""
    tensors = [part.weight(), part.bias()]
    plain = [t.dequantize().detach().cpu().numpy() for t in tensors if t is not None]
    return b"".join(array.tobytes() for array in plain)


_PLAIN = (bool, int, float, str, tuple)


def _hooked(model: Hooked) -> Iterator[Any]:
    yield from model.modules()
    yield from model.hook_points()


def _code(kinds: Iterable[type]) -> Iterator[bytes]:
    """The code of some classes, but that of packages, whose versions are recorded."""
    folders = set()
    for kind in sorted(kinds, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        yield f"{kind.__module__}.{kind.__qualname__};".encode()
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if file is None or not Path(file).is_file():
            for name, method in sorted(vars(kind).items()):
                if (code := getattr(method, "__code__", None)) is not None:
                    yield from _compiled(name, code)
        elif not _installed(Path(file)):
            folders.add(Path(file).resolve().parent)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is None or _installed(path := Path(file).resolve()):
            continue
        if folders & {*path.parents} and path.is_file():
            yield path.read_bytes()


def _installed(path: Path) -> bool:
    return "site-packages" in path.parts or Path(__file__).parents[2] in path.resolve().parents


def _compiled(name: str, code: CodeType) -> Iterator[bytes]:
    """Instructions, names and constants of a function and those inside it."""
    plain = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    yield name.encode() + code.co_code + repr((code.co_names, plain)).encode()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _compiled(inner.co_name, inner)


def stamp_of_data(data: str | Path | Items | None) -> str:
    """Hash a text.

    Args:
        data: Its file, or items; the shipped held-out samples when not given.

    Returns:
        The SHA-256 of the file or items, or that it cannot be read.
    """
    if isinstance(data, Items):
        return data.sha256
    return _of_file(zoo_folder() / "heldout.parquet" if data is None else Path(data))


def stamp_of_function(function: Any) -> str | None:
    """Tell a user's functions apart by their code.

    Args:
        function: A function, or None.

    Returns:
        A hash of its instructions, names and constants, and of what it closes over where that is
        plain; of what has no code one that equals no other. None for None.
    """
    if function is None:
        return None
    code = getattr(function, "__code__", None)
    closure = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    bound = [*closure, *(getattr(function, "__defaults__", None) or ())]
    if code is None or not all(value is None or isinstance(value, _PLAIN) for value in bound):
        return uuid4().hex
    digest = hashlib.sha256(repr(bound).encode())
    for part in _compiled(str(getattr(function, "__name__", "")), code):
        digest.update(part)
    return digest.hexdigest()


def stamp_of_spec(spec: Any) -> Any:
    """Tell specifications of a loop apart.

    Args:
        spec: As in `load`: values, a file, or None.

    Returns:
        The values as they are; of a file what `stamp_of_data` gives.
    """
    if spec is None or isinstance(spec, Mapping):
        return spec
    return _of_file(Path(spec))


def stamp_of_example(example: Any) -> str | None:
    """Tell examples apart.

    Args:
        example: As in `load`: arguments of forward, a file, or None.

    Returns:
        A hash of them, or of the file.
    """
    if example is None:
        return None
    if isinstance(example, Path):
        return _of_file(example)
    digest = hashlib.sha256()
    _add(digest, example)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add the tensors, numbers and names in a value to a hash."""
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__} {len(value)};".encode())
        for part in value:
            _add(digest, part)
    elif isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(f"{value!r};".encode())


def _of_file(path: Path) -> str:
    try:
        with path.expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return f"{path} cannot be read"  # whoever reads it says so


__all__ = [
    "stamp_of_data", "stamp_of_example", "stamp_of_function", "stamp_of_model", "stamp_of_spec",
    "stamp_of_target",
]  # fmt: skip
