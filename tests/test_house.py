"""The house: which room may enter which, what each offers, that everything says what it takes."""

import ast
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from importlinter import cli as linter

import loopscope
from loopscope.analysis.tables import MEASURED

PACKAGE = Path(loopscope.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
REFUSALS = {"InputError", "StoreError", "unknown_name"}
ROOMS = {".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py")}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room_of(module: str) -> str:
    """The innermost package that a module is in, or is."""
    return module if module in ROOMS else module.rpartition(".")[0]


def test_imports_point_one_way_and_in_no_circle(capsys):
    config = str(PACKAGE.parent / "pyproject.toml")
    assert linter.lint_imports(config_filename=config, no_cache=True) == 0, capsys.readouterr().out


def offers(*, modules: bool = True) -> dict[str, set[str]]:
    """What the `__init__` of each package imports for others, with or without whole modules."""
    offered: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        if path.name == "__init__.py":
            blocks = [node for node in tree_of(path).body if isinstance(node, ast.If)]
            for node in (inner for block in blocks for inner in ast.walk(block)):
                if isinstance(node, ast.ImportFrom) and (modules or node.module != module_of(path)):
                    offered[module_of(path)] |= {a.asname or a.name for a in node.names}
    return offered


def imports() -> Iterator[tuple[Path, str, str]]:
    """(file, module, name) of every `from module import name` of ours, deferred ones too."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loopscope"):
                for alias in node.names:
                    yield path, str(node.module), alias.name


def test_what_is_imported_from_another_folder_is_in_its_init():
    offered, wrong = offers(), []
    for path, module, name in imports():
        target = f"{module}.{name}" if f"{module}.{name}" in ROOMS else module
        room, importer = room_of(target), room_of(module_of(path))
        inside = f"{importer}.".startswith(f"{room}.") or room == "loopscope"
        if not inside and (target not in ROOMS or (target == module and name not in offered[room])):
            wrong.append(f"{path.relative_to(PACKAGE)}: from {module} import {name}")
    assert not wrong


def test_no_two_modules_have_one_name_and_none_that_of_what_its_folder_offers():
    names = Counter(path.stem for path in FILES if path.name not in ("__init__.py", "names.py"))
    assert [name for name, n in names.items() if n > 1] == []
    for room, offered in offers(modules=False).items():
        folder = PACKAGE.parent.joinpath(*room.split("."))
        assert not {path.stem for path in folder.glob("*.py")} & offered, room
    assert not {*names} & {*loopscope.__all__}


def public_functions() -> Iterator[tuple[str, ast.FunctionDef, ast.ClassDef | None]]:
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{path.relative_to(PACKAGE)}: {node.name}", node, None
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        name = f"{path.relative_to(PACKAGE)}: {node.name}.{method.name}"
                        yield name, method, node


def lacking(function: ast.FunctionDef, home: ast.ClassDef | None) -> list[str]:
    """What a docstring should have and does not."""
    text = ast.get_docstring(function)
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if text is None:  # an override says what the method it overrides says
        return [] if home is not None and home.bases else ["a docstring"]
    if any(d.endswith(("property", ".setter", "with_settings()")) for d in decorators) or any(
        "with_" in d for d in decorators
    ):
        return []
    given = function.args
    names = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}
    wanted = ["Args:"] if names else []
    gives = function.returns is not None and ast.unparse(function.returns) not in {
        "None", "NoReturn",
    }  # fmt: skip
    if names and gives and "Yields:" not in text:
        wanted.append("Returns:")
    raised = {
        ast.unparse(node.exc.func)
        for node in ast.walk(function)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    if raised & REFUSALS:
        wanted.append("Raises:")
    return [section for section in wanted if section not in text]


def test_public_functions_say_what_they_take_give_and_refuse():
    found = {name: lack for name, *what in public_functions() if (lack := lacking(*what))}
    assert not found


def test_every_name_that_is_used_exists():
    """ruff's F821, which is off since jaxtyping's shapes are names in strings: those are passed."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    command += ["--target-version", "py311", "--output-format", "json", str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True)
    lost = []
    for entry in json.loads(done.stdout):
        path, place = Path(entry["filename"]), entry["location"]
        at = (place["row"], place["column"] - 1)
        with path.open("rb") as file:
            strings = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.STRING]
        if not any(token.start <= at < token.end for token in strings):
            lost.append(f"{path.name}:{at[0]}: {entry['message']}")
    assert not lost


KIND = re.compile(
    r"isinstance\([^)]*\b(LoopModel|WrappedModel|Hooked|NamedHooks)\b|(get|has)attr\([^)]*[\"']map[\"']|"
    r"[\"']map[\"'] (not )?in "
)


def test_who_asks_what_kind_of_model_it_has():
    asked = {
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in FILES
        for line in path.read_text("utf-8").splitlines()
        if KIND.search(line)
    }
    assert len(asked) <= 5, asked


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_longer_than_one_idea(path):
    assert len(path.read_text("utf-8").splitlines()) <= 600


def test_the_readmes_table_of_measures_is_the_registrys():
    readme = (PACKAGE.parent / "README.md").read_text("utf-8")
    table = readme.partition("## What is measured")[2].partition("\n\n`compare`")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {*MEASURED}


def test_architecture_names_files_that_there_are():
    page = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.py)`", page))
    files = [str(path) for path in (*FILES, *Path(__file__).parent.glob("*.py"))]
    lost = {name for name in named if not any(path.endswith(f"/{name}") for path in files)}
    assert len(named) > 20 and not lost
