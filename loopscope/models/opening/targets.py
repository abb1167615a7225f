"""Targets: what a name, path, Hugging Face id or factory means, and what opening one gives."""

import re
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from loopscope.errors import InputError, unknown_name
from loopscope.models.native import is_gpt_neox, read_json
from loopscope.names import UNTRAINED

Kind = Literal["native", "huggingface", "factory", "hub"]

KINDS = (
    "Zoo names, checkpoint folders (loopscope's or Hugging Face's), their untrained twins "
    "TARGET@init, Hugging Face ids org/name, module:factory and file.py:factory can be loaded."
)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
_LEGACY_ID = re.compile(r"[A-Za-z0-9][\w.-]*")
_FACTORY = re.compile(r"(?P<where>.+):(?P<name>[A-Za-z_][\w.]*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a target string means.

    Attributes:
        kind: `native` and `huggingface` are folders, `hub` an id, `factory` Python code.
        place: The folder, the id, or `where:name`.
        label: The model's name in tables and figures.
        untrained: Whether the untrained twin is meant (`@init`).
    """

    kind: Kind
    place: str
    label: str
    untrained: bool = False


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """An opened model, before its loop is looked for.

    Attributes:
        module: The torch module, in evaluation mode.
        example: What its forward is given, where a factory says so.
        tokenizer: A tokenizer, or None.
        provenance: Where the weights came from, as JSON values.
        spec: The file `loopscope.toml` beside the weights, if there is one.
    """

    module: Any
    example: Any = None
    tokenizer: Any = None
    provenance: dict[str, Any] = field(default_factory=dict)
    spec: Path | None = None


def zoo_folder() -> Path:
    """The folder of the shipped checkpoints."""
    return Path(str(files("loopscope") / "zoo"))


def zoo() -> list[str]:
    """Names of the shipped checkpoints."""
    return sorted(path.parent.name for path in zoo_folder().glob("*/config.json"))


def locate(target: str | Path, *, trust_remote_code: bool = False, weights: bool = True) -> Target:
    """What a target means, and the folder it is in; a Hugging Face id's is downloaded if need be.

    Args:
        target: As in `load`.
        trust_remote_code: Whether Python code that came with a checkpoint may be downloaded too.
        weights: Whether the weights of a Hugging Face id are needed.

    Returns:
        A folder (native or Hugging Face's), or a factory.

    Raises:
        InputError: if nothing is found there.
    """
    place = find_target(target)
    if place.kind == "hub":
        return downloaded(place, weights=weights, code=trust_remote_code)
    return place


def find_target(target: str | Path) -> Target:
    """What a target means; nothing of it is loaded or downloaded.

    Args:
        target: As in `load`.

    Returns:
        A folder (native or Hugging Face's), a Hugging Face id, or a factory.

    Raises:
        InputError: if nothing is found there.
    """
    full = str(target)
    text = full.removesuffix(UNTRAINED)
    suffix = full[len(text) :]
    shipped = zoo_folder() / text
    if text and Path(text).name == text and (shipped / "config.json").exists():
        return Target(kind="native", place=str(shipped), label=full, untrained=bool(suffix))
    folder = Path(text).expanduser()
    if text and (folder / "config.json").is_file():
        return _folder_target(folder, folder.resolve().name + suffix, bool(suffix))
    if text and folder.is_dir():
        raise InputError(
            f"{text} is a folder without config.json, so it is no checkpoint. A checkpoint folder "
            "holds config.json and its weights, such as model.safetensors."
        )
    factory = factory_target(text) if text else None
    if factory is not None:
        if suffix:
            raise InputError(
                f"{full}: a factory makes its own weights, so it has no untrained twin; write a "
                "second one that returns the model untrained."
            )
        return factory
    if text and folder.exists():
        raise InputError(f"{text} is a file; give the checkpoint's folder instead.")
    hub = hub_target(text) if text else None
    if hub is not None:
        return replace(hub, label=hub.label + suffix, untrained=bool(suffix))
    raise unknown_name("model", text, zoo(), hint=f"No such folder either. {KINDS}")


def factory_target(text: str) -> Target | None:
    """`package.module:factory` or `file.py:factory`; None for any other text.

    Args:
        text: A target, without `@init`.

    Returns:
        The target, or None.

    Raises:
        InputError: for a Python file without the name of a factory.
    """
    where, colon, name = text.rpartition(":")
    file = where if colon else text
    if file.endswith(".py") and not (colon and name):
        raise InputError(
            f"{text} is a Python file; name what makes the model in it: {file}:FACTORY."
        )
    if not _FACTORY.fullmatch(text) or not (file.endswith(".py") or _MODULE.fullmatch(where)):
        return None
    return Target(kind="factory", place=text, label=name.rpartition(".")[2])


def hub_target(text: str) -> Target | None:
    """`org/name`, or a single name that is in the local cache; None for any other text.

    Args:
        text: A target, without `@init`.

    Returns:
        The target, or None.
    """
    if _ID.fullmatch(text) or (_LEGACY_ID.fullmatch(text) and _is_cached(text)):
        return Target(kind="hub", place=text, label=text.rpartition("/")[2])
    return None


def downloaded(target: Target, *, weights: bool, code: bool) -> Target:
    """The folder of a Hugging Face id, from the local cache or else the network.

    Args:
        target: The id.
        weights: Whether the weights are needed; an untrained twin never needs them.
        code: Whether Python files are needed (remote code that the user trusts).

    Returns:
        The folder, native or Hugging Face's.
    """
    from loopscope.models.opening.hub import hub_folder

    folder = hub_folder(target.place, weights=weights and not target.untrained, code=code)
    return _folder_target(folder, target.label, target.untrained)


def is_pretrained(values: dict[str, Any]) -> bool:
    """Whether a `config.json` is one of Hugging Face's.

    Args:
        values: Its content.

    Returns:
        Whether it is.
    """
    return values.get("format") != "loopscope" and any(
        key in values for key in ("model_type", "architectures", "auto_map")
    )


def _folder_target(folder: Path, label: str, untrained: bool) -> Target:
    """A folder with a config.json: loopscope's own and GPT-NeoX are native."""
    values = read_json(folder / "config.json")
    foreign = is_pretrained(values) and not is_gpt_neox(values)
    return Target(
        kind="huggingface" if foreign else "native",
        place=str(folder),
        label=label,
        untrained=untrained,
    )


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
