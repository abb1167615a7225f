"""`load`: a zoo name, a folder, a Hugging Face id or the user's own Python gives a model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loopscope.devices import check_seed, parse_device, parse_dtype
from loopscope.errors import InputError
from loopscope.models.native import (
    Layout,
    LoopConfig,
    LoopModel,
    config_from_hf,
    is_gpt_neox,
    load_checkpoint,
    load_hf,
    read_config,
    read_json,
    read_tokenizer,
)
from loopscope.models.opening.examples import read_example
from loopscope.models.opening.targets import (
    OpenedModel,
    Target,
    downloaded,
    find_target,
    locate,
)


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
    example: Any = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> Any:
    """Load a model by name, folder, Hugging Face id, or from the user's own Python.

    Args:
        target: A zoo name (`mesh`); a checkpoint folder (loopscope's own, or any model saved by
            Hugging Face); a Hugging Face id (`org/name`; the local cache first); or
            `package.module:factory` and `file.py:factory`, called without arguments, which give a
            module, `(module, example)`, or a model of `wrap` or `load`. With `@init`
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
        example: What a foreign model's forward is given, as in `wrap`; a `Path` to a `.npy` file
            (an array) or a `.pt` file (a tensor, tuple or dict). It comes before a factory's.
        trust_remote_code: Whether Python code that came with a checkpoint may run.
        device_map: Spreads a Hugging Face checkpoint over devices (`auto`), instead of device.

    Returns:
        The model, in evaluation mode: a `LoopModel` for loopscope's and GPT-NeoX checkpoints, a
        `WrappedModel` for any other.

    Raises:
        InputError: if nothing is found there, or a part is damaged; the message says what.
    """
    float_type = None if dtype is None else parse_dtype(dtype)
    torch_device = None if device is None else parse_device(device)
    check_seed(seed)
    if device is not None and device_map is not None:
        raise InputError("device and device_map exclude each other; give one of them.")
    located = locate(target, trust_remote_code=trust_remote_code)
    label = name or located.label
    if located.kind == "native":
        _refuse(located.place, spec=spec, example=example, device_map=device_map)
        model = _load_native(located, label, float_type or torch.float32, seed)
        if loops is not None:
            model = model.with_loops(loops)
        if layout is not None:
            model = model.with_layout(layout)
        return model.to(torch_device or "cpu")
    if located.kind == "factory":
        _refuse(located.place, device_map=device_map)
        opened = _run_factory(located, torch_device, float_type)
    else:
        from loopscope.models.opening.pretrained import open_pretrained

        opened = open_pretrained(
            Path(located.place),
            dtype=float_type or torch.float32,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            untrained=seed if located.untrained else None,
        )
        if torch_device is not None:
            opened.module.to(torch_device)
    if example is not None:
        opened = replace(opened, example=read_example(example))
    return _wrap_opened(opened, label, spec=spec, layout=layout, loops=loops)


def peek(target: str | Path, *, trust_remote_code: bool = False) -> tuple[str, LoopConfig | None]:
    """Name and configuration of a model that could be loaded; its weights are not read.

    Args:
        target: As in `load`.
        trust_remote_code: Whether Python code that came with a checkpoint may be downloaded too.

    Returns:
        The name, and the configuration of a native model; None for a foreign one.

    Raises:
        InputError: if nothing is found there, or the configuration cannot be used.
    """
    located = find_target(target)
    weights = located.kind != "hub" and not located.untrained
    if located.kind == "hub":
        located = downloaded(located, weights=False, code=trust_remote_code)
    if located.kind == "native":
        return located.label, _config(Path(located.place))
    if located.kind == "factory":
        from loopscope.models.opening.factories import check_factory

        check_factory(located.place)
    else:
        from loopscope.models.opening.pretrained import check_pretrained

        check_pretrained(Path(located.place), trust_remote_code=trust_remote_code, weights=weights)
    return located.label, None


def _load_native(located: Target, label: str, dtype: torch.dtype, seed: int) -> LoopModel:
    folder = Path(located.place)
    if located.untrained:
        config = _config(folder)
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        model = LoopModel(config, seed=seed, name=label, tokenizer=tokenizer).to(dtype).eval()
        model.provenance = {"untrained": True, "seed": seed}
        return model
    if is_gpt_neox(read_json(folder / "config.json")):
        return load_hf(folder, name=label, dtype=dtype)
    return load_checkpoint(folder, name=label, dtype=dtype)


def _run_factory(
    located: Target, device: torch.device | None, dtype: torch.dtype | None
) -> OpenedModel:
    """What a factory makes, moved and cast as far as that is asked for."""
    from loopscope.models.opening.factories import open_factory

    opened = open_factory(located.place)
    for change in (device, dtype):
        if change is not None:
            opened.module.to(change)
    return opened


def _wrap_opened(opened: OpenedModel, label: str, *, spec: Any, layout: Any, loops: Any) -> Any:
    """The opened module as a model that is measured like any other."""
    from loopscope.models.wrapped import wrap

    return wrap(
        opened.module,
        opened.example,
        spec=opened.spec if spec is None else spec,
        layout=None if layout is None else str(layout),
        loops=loops,
        name=label,
        tokenizer=opened.tokenizer,
        provenance=opened.provenance,
    )


def _refuse(what: str, **options: Any) -> None:
    """Options that mean nothing for a target are errors, not ignored."""
    wrong = [name for name, value in options.items() if value is not None]
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
