"""`load`: a zoo name, a folder, a Hugging Face id or the user's own Python gives a model."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from loopscope.devices import check_seed, parse_device, parse_dtype
from loopscope.errors import InputError, unknown_name
from loopscope.models.hooked import Hooked
from loopscope.models.native.checkpoint import (
    load_checkpoint,
    read_config,
    read_json,
    read_tokenizer,
)
from loopscope.models.native.configuration import Layout, LoopConfig
from loopscope.models.native.gpt_neox import config_from_hf, is_gpt_neox, load_hf
from loopscope.models.native.loop_model import LoopModel
from loopscope.models.opening.sources import KINDS, Source, Target, factory_target, hub_target
from loopscope.names import UNTRAINED


def zoo_folder() -> Path:
    """The folder of the shipped checkpoints."""
    return Path(str(files("loopscope") / "zoo"))


def zoo() -> list[str]:
    """Names of the shipped checkpoints."""
    return sorted(path.parent.name for path in zoo_folder().glob("*/config.json"))


def load(
    target: str | Path,
    *,
    layout: str | Layout | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    name: str | None = None,
    loops: int | Mapping[str, int] | None = None,
    spec: str | Path | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> Any:
    """Load a model by name, folder, Hugging Face id, or from the user's own Python.

    Args:
        target: A zoo name (`mesh`); a checkpoint folder (loopscope's own, or any model saved by
            Hugging Face); a Hugging Face id (`org/name`; the local cache first); or
            `package.module:factory` and `file.py:factory`, called without arguments. With `@init`
            the untrained twin of the same configuration. A name without a slash means the zoo
            first; write `./mesh` for a folder.
        layout: Groups the layers of a model without a loop into virtual blocks, such as `4+8+8+4`.
        device: Where the weights go; the CPU when not given, or where a factory puts them.
        dtype: Floating type in memory; float32 when not given, or what a factory makes.
        seed: Seed of the initial weights of an `@init` twin.
        name: The model's name in tables and figures; made from the target when not given.
        loops: Iterations to run, or iterations by loop name, where the model allows it.
        spec: How a foreign model loops, where it is not found rightly: a TOML file or its content
            as a dict. A file `loopscope.toml` in the checkpoint's folder is used by itself.
        trust_remote_code: Whether Python code that came with a checkpoint may run.
        device_map: Spreads a Hugging Face checkpoint over devices (`auto`), instead of device.

    Returns:
        The model, in evaluation mode: a `LoopModel` for loopscope's and GPT-NeoX checkpoints, a
        `WrappedModel` for any other.

    Raises:
        InputError: if nothing is found there, or a part is damaged; the message says what.
    """
    kind = None if dtype is None else parse_dtype(dtype)
    place = None if device is None else parse_device(device)
    check_seed(seed)
    if device is not None and device_map is not None:
        raise InputError("device and device_map exclude each other; give one of them.")
    found = locate(target, trust_remote_code=trust_remote_code)
    label = name or found.label
    if found.kind == "native":
        _refuse(found.place, spec=spec, device_map=device_map)
        model = _load_native(found, label, kind or torch.float32, seed)
        if loops is not None:
            model = model.with_loops(loops)
        if layout is not None:
            model = model.with_layout(layout)
        return model.to(place or "cpu")
    if found.kind == "factory":
        from loopscope.models.opening.factories import open_factory

        _refuse(found.place, device_map=device_map)
        source = open_factory(found.place)
        for where in (place, kind):
            if where is not None:
                source.module.to(where)
    else:
        from loopscope.models.opening.pretrained import open_pretrained

        source = open_pretrained(
            Path(found.place),
            dtype=kind or torch.float32,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            untrained=seed if found.untrained else None,
        )
        if place is not None:
            source.module.to(place)
    return _wrapped(source, label, spec=spec, layout=layout, loops=loops)


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
    found = _find(str(target))
    if found.kind == "hub":
        return _downloaded(found, weights=weights, code=trust_remote_code)
    return found


def peek(target: str | Path, *, trust_remote_code: bool = False) -> tuple[str, LoopConfig | None]:
    """Name and configuration of a model that could be loaded; its weights are not read.

    Returns:
        The name, and the configuration of a native model; None for a foreign one.

    Raises:
        InputError: if nothing is found there, or the configuration cannot be used.
    """
    found = _find(str(target))
    if found.kind == "hub":
        found = _downloaded(found, weights=False, code=trust_remote_code)
        weights = False
    else:
        weights = not found.untrained
    if found.kind == "native":
        return found.label, _config(Path(found.place))
    if found.kind == "factory":
        from loopscope.models.opening.factories import check_factory

        check_factory(found.place)
    else:
        from loopscope.models.opening.pretrained import check_pretrained

        check_pretrained(Path(found.place), trust_remote_code=trust_remote_code, weights=weights)
    return found.label, None


def _load_native(found: Target, label: str, dtype: torch.dtype, seed: int) -> LoopModel:
    folder = Path(found.place)
    if found.untrained:
        config = _config(folder)
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        model = LoopModel(config, seed=seed, name=label, tokenizer=tokenizer).to(dtype).eval()
        model.provenance = {"untrained": True, "seed": seed}
        return model
    if is_gpt_neox(read_json(folder / "config.json")):
        return load_hf(folder, name=label, dtype=dtype)
    return load_checkpoint(folder, name=label, dtype=dtype)


def _wrapped(source: Source, label: str, *, spec: Any, layout: Any, loops: Any) -> Any:
    """The opened module as a model that is measured like any other."""
    from loopscope.models.wrapped.wrapping import wrap

    module: Any = source.module
    if isinstance(module, Hooked):
        _refuse("a factory that gives a loopscope model", spec=spec)
        module = wrap(module, loops=loops, layout=layout)
        module.name = label
        return module
    return wrap(
        module,
        spec=source.spec if spec is None else spec,
        layout=None if layout is None else str(layout),
        loops=loops,
        name=label,
        tokenizer=source.tokenizer,
        provenance=source.provenance,
    )


def _refuse(what: str, **given: Any) -> None:
    """Options that mean nothing for a target are errors, not ignored."""
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise InputError(
            f"{what} takes no {' and no '.join(wrong)}; that is for models opened through "
            "transformers or from your own Python. Leave it out."
        )


def _config(folder: Path) -> LoopConfig:
    values = read_json(folder / "config.json")
    if is_gpt_neox(values):
        return config_from_hf(values, str(folder / "config.json"))
    return read_config(folder)


def _find(target: str) -> Target:
    """What a target means; nothing of it is loaded."""
    text = target.removesuffix(UNTRAINED)
    twin = target != text
    shipped = zoo_folder() / text
    if text and Path(text).name == text and (shipped / "config.json").exists():
        return Target(kind="native", place=str(shipped), label=target, untrained=twin)
    folder = Path(text).expanduser()
    if text and (folder / "config.json").is_file():
        return _folder_target(folder, folder.resolve().name + target[len(text) :], twin)
    if text and folder.is_dir():
        raise InputError(
            f"{text} is a folder without config.json, so it is no checkpoint. A checkpoint folder "
            "holds config.json and its weights, such as model.safetensors."
        )
    made = factory_target(text) if text else None
    if made is not None:
        if twin:
            raise InputError(
                f"{target}: a factory makes its own weights, so it has no untrained twin; write a "
                "second one that returns the model untrained."
            )
        return made
    if text and folder.exists():
        raise InputError(f"{text} is a file; give the checkpoint's folder instead.")
    known = hub_target(text) if text else None
    if known is not None:
        label = known.label + target[len(text) :]
        return Target(kind="hub", place=known.place, label=label, untrained=twin)
    raise unknown_name("model", text, zoo(), hint=f"No such folder either. {KINDS}")


def _folder_target(folder: Path, label: str, untrained: bool) -> Target:
    """A folder with a config.json: loopscope's own and GPT-NeoX are native."""
    from loopscope.models.opening.pretrained import is_pretrained

    values = read_json(folder / "config.json")
    foreign = is_pretrained(values) and not is_gpt_neox(values)
    return Target(
        kind="huggingface" if foreign else "native",
        place=str(folder),
        label=label,
        untrained=untrained,
    )


def _downloaded(found: Target, *, weights: bool, code: bool) -> Target:
    """The folder of a Hugging Face id."""
    from loopscope.models.opening.hub import hub_folder

    folder = hub_folder(found.place, weights=weights and not found.untrained, code=code)
    return _folder_target(folder, found.label, found.untrained)
