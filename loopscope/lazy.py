"""Packages whose public names are imported when first used (PEP 562).

What a package offers stands in its `__init__`, once, as imports for type checkers:

    if TYPE_CHECKING:
        from loopscope.figures.rank_lines import rank as rank

    __getattr__, __dir__, __all__ = lazy(__name__)
"""

import ast
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the module functions `__getattr__` and `__dir__` of a package, and its `__all__`.

    Args:
        package: Its `__name__`.

    Returns:
        `__getattr__`, which imports a name when it is first used and raises an AttributeError for
        names that are not offered; `__dir__`; and the names offered.
    """
    homes = _offered(package)

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        if module == package:  # a module of the package
            value: Any = import_module(f"{package}.{attribute}")
        else:
            value = getattr(import_module(module), attribute)
        vars(import_module(package))[name] = value
        return value

    def names() -> list[str]:
        return sorted({*vars(import_module(package)), *homes})

    return getattribute, names, sorted(homes)


def _offered(package: str) -> dict[str, tuple[str, str]]:
    """Name → (module, its name there), as the package imports them for type checkers."""
    spec = find_spec(package)
    source = spec.loader.get_source(package) if spec and spec.loader else None  # type: ignore[attr-defined]
    if source is None:
        raise ImportError(f"{package} has no source to read what it offers from; install its .py.")
    return {
        alias.asname or alias.name: (str(node.module), alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
