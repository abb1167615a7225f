"""Models made by the user's own Python: `package.module:factory` and `file.py:factory`."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from loopscope.errors import InputError, unknown_name
from loopscope.models.opening.targets import OpenedModel

_siblings: dict[str, Path] = {}
"""Modules imported from the folder of a `file.py`; those of another folder take their place."""


def check_factory(place: str) -> None:
    """Whether the file or module is there; nothing is run.

    Args:
        place: `package.module:factory` or `file.py:factory`.

    Raises:
        InputError: if it is not.
    """
    where, _, _ = place.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).expanduser().is_file():
            raise InputError(f"there is no file {where}, so {place} cannot make a model.")
        return
    with _importable(Path.cwd()):
        top = where.partition(".")[0]
        if top not in sys.modules and importlib.util.find_spec(top) is None:
            raise InputError(
                f"there is no Python module {top!r}, looked for in the current folder and among "
                f"the installed packages; {place} names a module and what makes the model in it."
            )


def open_factory(place: str) -> OpenedModel:
    """Import, and call the factory with no arguments.

    Args:
        place: `package.module:factory` or `file.py:factory`. A class is called likewise; what
            stands there ready is taken as it is. It gives a `torch.nn.Module`, a model of `wrap`
            or `load`, or a tuple of the module and an example of what its forward takes.

    Returns:
        The module in evaluation mode, and the example if there is one.

    Raises:
        InputError: if there is no such file or name, the user's code raises, or the result is no
            module.
    """
    check_factory(place)
    made = _call_factory(place)
    pair = isinstance(made, tuple) and len(made) == 2
    module, example = made if pair else (made, None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{place} gave {_described(made)}, but the model must be a torch.nn.Module; return the "
            "module itself, a model of ls.wrap, or (module, example)."
        )
    return OpenedModel(
        module=module.eval(),
        example=example,
        provenance={"source": place, "class": type(module).__qualname__},
    )


def _call_factory(place: str) -> Any:
    """What the user's code makes; a module that stands there ready is taken as it is."""
    where, _, name = place.rpartition(":")
    file = Path(where).expanduser().resolve() if where.endswith(".py") else None
    with _importable(file.parent if file else Path.cwd(), remember=file is not None):
        with _named_failure(f"importing {where}", file):
            home = _import_file(file) if file else importlib.import_module(where)
        factory = _attribute(home, name, place)
        if isinstance(factory, nn.Module | tuple):
            return factory
        _check_callable(factory, place)
        with _named_failure(f"{name}() of {where}", file):
            return factory()


@contextmanager
def _importable(folder: Path, *, remember: bool = False) -> Iterator[None]:
    """Put a folder first on the import path; what is imported from it may be replaced later."""
    if remember:
        for name, home in list(_siblings.items()):
            top = name.partition(".")[0]
            if home == folder or (folder / top).is_dir() or (folder / f"{top}.py").is_file():
                sys.modules.pop(name, None)
                del _siblings[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before if remember else ():
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).resolve().is_relative_to(folder):
                _siblings[name] = folder


@contextmanager
def _named_failure(doing: str, file: Path | None) -> Iterator[None]:
    """Whatever the user's code raises becomes one error that names its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        in_file = [f for f in frames if file is not None and Path(f.filename) == file]
        elsewhere = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
        last = (in_file or elsewhere)[-1:]
        at = "".join(f" ({Path(f.filename).name}, line {f.lineno})" for f in last)
        if isinstance(error, SyntaxError) and error.filename:
            at = f" ({Path(error.filename).name}, line {error.lineno})"
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InputError(f"{doing} failed with {reason}{at}.") from error


def _import_file(file: Path) -> ModuleType:
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    name = f"loopscope_file_{digest}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(home: ModuleType, name: str, place: str) -> Any:
    value: Any = home
    for part in name.split("."):
        if not hasattr(value, part):
            names = [n for n in vars(value) if not n.startswith("_")]
            where = place.rpartition(":")[0]
            raise unknown_name(f"name in {where}", part, names, hint="It must make the model.")
        value = getattr(value, part)
    return value


def _check_callable(factory: Any, place: str) -> None:
    if not callable(factory):
        raise InputError(
            f"{place} is a {type(factory).__name__}; it must be a function without arguments that "
            "returns a torch.nn.Module or (module, example), or such a module."
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise InputError(
            f"{place} cannot be called without arguments ({error}); write a function that takes "
            "none and returns the model."
        ) from error
    except ValueError:
        pass  # built-in callables have no signature


def _described(made: Any) -> str:
    """What a factory gave, in words."""
    if isinstance(made, tuple):
        return f"a tuple ({', '.join(type(part).__name__ for part in made)})"
    return type(made).__name__
