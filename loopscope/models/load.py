"""`load`: a zoo name, an untrained twin, or a folder gives a model."""

from importlib.resources import files
from pathlib import Path

import torch

from loopscope.errors import InputError, unknown_name
from loopscope.models.checkpoint import load_checkpoint, read_config, read_json, read_tokenizer
from loopscope.models.config import LoopConfig
from loopscope.models.hf import config_from_hf, is_gpt_neox, load_hf
from loopscope.models.layout import Layout
from loopscope.models.model import LoopModel

UNTRAINED = "@init"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def zoo_folder() -> Path:
    """The folder of the shipped checkpoints."""
    return Path(str(files("loopscope") / "zoo"))


def zoo() -> list[str]:
    """Names of the shipped checkpoints."""
    return sorted(path.parent.name for path in zoo_folder().glob("*/config.json"))


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]


def check_seed(seed: int) -> int:
    """A seed that numpy's and torch's generators take.

    Raises:
        InputError: outside 0 … 2⁶³ − 1.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie in 0 … 2**63 - 1, given {seed}.")
    return seed


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device that is present here.

    Raises:
        InputError: for an unknown device or one this machine lacks.
    """
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        present.append("mps")
    try:
        parsed = torch.device("cpu" if device is None else device)
    except RuntimeError as err:
        raise InputError(f"unknown device {device!r}; present here: {', '.join(present)}.") from err
    known = [*present, *({"cuda"} if torch.cuda.is_available() else ())]
    if str(parsed) not in known:
        raise InputError(f"device {str(device)!r} is absent; present here: {', '.join(present)}.")
    return parsed


def load(
    target: str | Path,
    *,
    layout: str | Layout | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.float32,
    seed: int = 0,
    name: str | None = None,
) -> LoopModel:
    """Load a model by name or folder.

    Args:
        target: A zoo name (`mesh`), a checkpoint folder (loopscope's own, or GPT-NeoX as saved by
            Hugging Face), or either with `@init` for the untrained twin of the same configuration.
            A name without a slash means the zoo first; write `./mesh` for a folder.
        layout: Groups the layers of a vanilla model into virtual blocks, such as `4+8+8+4`.
        device: Where the weights go; the CPU when not given.
        dtype: Floating type in memory.
        seed: Seed of the initial weights of an `@init` twin.
        name: The model's name in tables and figures; the zoo name or the folder's when not given.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: if nothing is found there, or a part is damaged; the message says what.
    """
    place, kind = parse_device(device), parse_dtype(dtype)
    check_seed(seed)
    folder, label = _find(str(target))
    label = name or label
    if str(target).endswith(UNTRAINED):
        config = _config(folder)
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        model = LoopModel(config, seed=seed, name=label, tokenizer=tokenizer).to(kind).eval()
        model.provenance = {"untrained": True, "seed": seed}
    elif is_gpt_neox(read_json(folder / "config.json")):
        model = load_hf(folder, name=label, dtype=kind)
    else:
        model = load_checkpoint(folder, name=label, dtype=kind)
    if layout is not None:
        model = model.with_layout(layout)
    return model.to(place)


def peek(target: str | Path) -> tuple[str, LoopConfig]:
    """Name and configuration of a model that could be loaded; its weights are not read.

    Raises:
        InputError: if nothing is found there, or the configuration cannot be used.
    """
    folder, label = _find(str(target))
    return label, _config(folder)


def _config(folder: Path) -> LoopConfig:
    values = read_json(folder / "config.json")
    if is_gpt_neox(values):
        return config_from_hf(values, str(folder / "config.json"))
    return read_config(folder)


def _find(target: str) -> tuple[Path, str]:
    """The folder that a target means, and the model's name."""
    text = target.removesuffix(UNTRAINED)
    suffix = target[len(text) :]
    shipped = zoo_folder() / text
    if text and Path(text).name == text and (shipped / "config.json").exists():
        return shipped, target
    folder = Path(text).expanduser()
    if text and (folder / "config.json").is_file():
        return folder, folder.resolve().name + suffix
    if text and folder.is_dir():
        raise InputError(
            f"{text} is a folder without config.json, so it is no checkpoint. A checkpoint folder "
            "holds config.json and model.safetensors."
        )
    if text and folder.exists():
        raise InputError(f"{text} is a file; give the checkpoint's folder instead.")
    hint = "Zoo names, their untrained twins NAME@init, and checkpoint folders can be loaded."
    raise unknown_name("model", text, zoo(), hint=f"No such folder either. {hint}")
