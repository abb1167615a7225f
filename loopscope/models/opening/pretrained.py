"""Folders saved by Hugging Face's `save_pretrained`, as the torch modules that transformers has."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from loopscope.errors import InputError
from loopscope.models.native import read_json, read_tokenizer, weight_files
from loopscope.models.opening.remote_code import fill_buffers, named_failures, repaired
from loopscope.models.opening.targets import OpenedModel
from loopscope.text import usable_tokenizer

SPEC_FILE = "loopscope.toml"
_AUTO = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")
_TOKENIZER_FILES = ("vocab.*", "*.model", "*.tiktoken", "vocab-*")


def needs_remote_code(values: dict[str, Any]) -> bool:
    """Whether a checkpoint needs Python code that came with it, for lack of a class of its own.

    Args:
        values: Its `config.json`.

    Returns:
        Whether transformers cannot open it by itself.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    if not values.get("auto_map"):
        return False
    architectures = values.get("architectures") or []
    missing = [name for name in architectures if not hasattr(transformers, name)]
    return values.get("model_type") not in CONFIG_MAPPING or bool(missing)


def check_pretrained(folder: Path, *, trust_remote_code: bool, weights: bool = True) -> bool:
    """Look at a folder without reading its weights.

    Args:
        folder: Holds `config.json`.
        trust_remote_code: Whether code that came with the checkpoint may run.
        weights: Whether its weights must be there.

    Returns:
        Whether remote code is needed.

    Raises:
        InputError: if transformers does not know the model, its code is not trusted, or weights
            are missing.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    values = read_json(folder / "config.json")
    remote = needs_remote_code(values)
    if remote and not trust_remote_code:
        files = sorted({ref.rpartition(".")[0] + ".py" for ref in _references(values).values()})
        raise InputError(
            f"{folder} needs Python code that came with it ({', '.join(files)}), since "
            f"transformers {transformers.__version__} has no class for it. Read that code, and if "
            "you trust it give --trust-remote-code (in Python: trust_remote_code=True)."
        )
    kind = values.get("model_type")
    if not remote and kind not in CONFIG_MAPPING:
        raise InputError(
            f"{folder} has model_type {kind!r}, which transformers {transformers.__version__} does "
            "not know, and no code of its own (auto_map); update transformers, or give "
            "file.py:FACTORY, a function that returns the model."
        )
    if weights and not weight_files(folder):
        raise InputError(
            f"{folder} has no weights: looked for model.safetensors, pytorch_model.bin and their "
            "indices. For an untrained twin write @init after the name."
        )
    return remote


def open_pretrained(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device_map: Any = None,
    trust_remote_code: bool = False,
    untrained: int | None = None,
) -> OpenedModel:
    """Open a folder with the class that fits it: causal LM, masked LM, or the one it names.

    Args:
        folder: Holds `config.json` and weights (safetensors, or plain pickled tensors).
        dtype: Floating type in memory.
        device_map: Passed to transformers, which spreads the weights with accelerate.
        trust_remote_code: Whether code that came with the checkpoint may run.
        untrained: Seed of fresh weights instead of the saved ones.

    Returns:
        The module in evaluation mode, and its tokenizer if it has one.

    Raises:
        InputError: for whatever is missing, damaged or not trusted.
    """
    remote = check_pretrained(
        folder, trust_remote_code=trust_remote_code, weights=untrained is None
    )
    unused: list[str] = []
    if untrained is not None:
        module = _make_untrained(folder, remote, dtype, seed=untrained)
    else:
        module, unused = _load_weights(folder, remote, dtype, device_map)
    provenance: dict[str, Any] = {
        "source": str(folder), "class": type(module).__name__, "remote_code": remote,
    }  # fmt: skip
    if unused:
        provenance["unused_weights"] = unused
    if untrained is not None:
        provenance |= {"untrained": True, "seed": untrained}
    spec = folder / SPEC_FILE
    return OpenedModel(
        module=module.eval(),
        tokenizer=_tokenizer(folder, remote),
        provenance=provenance,
        spec=spec if spec.is_file() else None,
    )


@contextmanager
def _class_and_config(folder: Path, remote: bool, *, untrained: bool) -> Iterator[tuple[Any, Any]]:
    """Within this context a checkpoint's code runs, repaired; gives its class and configuration."""
    import transformers

    values = read_json(folder / "config.json")
    references = _references(values) if remote else {}
    with (
        _quiet(),
        named_failures(folder, remote=remote),
        repaired(folder, values, references, untrained=untrained),
    ):
        config = transformers.AutoConfig.from_pretrained(folder, **_loading(remote))
        yield _class(config, values, references), config


def _make_untrained(folder: Path, remote: bool, dtype: torch.dtype, *, seed: int) -> nn.Module:
    """Fresh weights, drawn in float32 by the class's own initialisation."""
    with (
        _class_and_config(folder, remote, untrained=True) as (model_class, config),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(seed)
        auto = hasattr(model_class, "from_config")
        make = model_class.from_config if auto else model_class._from_config
        code = {"trust_remote_code": remote} if auto else {}
        return make(config, dtype=torch.float32, **code).to(dtype)


def _load_weights(
    folder: Path, remote: bool, dtype: torch.dtype, device_map: Any
) -> tuple[nn.Module, list[str]]:
    """The module with the saved weights, and the names of those that it has no use for."""
    with _class_and_config(folder, remote, untrained=False) as (model_class, config):
        if not remote:
            _check_names(folder, model_class, config)
        more = {} if device_map is None else {"device_map": device_map}
        module, info = model_class.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, **_loading(remote), **more,
        )  # fmt: skip
        unused = _check_loaded(folder, module, info)
        if remote:
            fill_buffers(module, config)
    return module, unused


def _loading(remote: bool) -> dict[str, bool]:
    """Arguments of transformers's `from_pretrained`: this folder alone, its code if trusted."""
    return {"local_files_only": True, "trust_remote_code": remote}


def _references(values: dict[str, Any]) -> dict[str, str]:
    """`auto_map` as name of the auto class → `file.Class`."""
    auto_map = values.get("auto_map") or {}
    return {auto: ref for auto, ref in auto_map.items() if isinstance(ref, str) and "." in ref}


def _class(config: Any, values: dict[str, Any], references: dict[str, str]) -> Any:
    """The class to open a checkpoint with."""
    import transformers

    if references:
        auto_class = next((auto for auto in _AUTO if auto in references), None)
        if auto_class is None:
            raise InputError(
                f"its auto_map names no {', '.join(_AUTO)}, so no language model can be made "
                "of it; give file.py:FACTORY, a function that returns the model."
            )
        return getattr(transformers, auto_class)
    maps = {
        "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForMaskedLM": transformers.MODEL_FOR_MASKED_LM_MAPPING,
        "AutoModel": transformers.MODEL_MAPPING,
    }
    architecture = next(iter(values.get("architectures") or []), None)
    saved_class = getattr(transformers, architecture, None) if architecture else None
    fitting = {
        auto: classes[type(config)] for auto, classes in maps.items() if type(config) in classes
    }
    if saved_class in fitting.values():  # the class whose weights were saved
        return saved_class
    for auto in _AUTO[:2]:
        if auto in fitting:
            return getattr(transformers, auto)
    return saved_class or transformers.AutoModel


def _check_names(folder: Path, model_class: Any, config: Any) -> None:
    """Whether the weights are of this kind of model at all, before memory is taken for them."""
    stored: set[str] = set()
    for file in weight_files(folder):
        if not file.endswith(".safetensors"):
            return  # pickled tensors have no header to look at
        with safe_open(folder / file, framework="pt") as opened:
            stored |= set(opened.keys())
    auto = hasattr(model_class, "from_config")
    make = model_class.from_config if auto else model_class._from_config
    with torch.device("meta"):
        expected = make(config).state_dict()
    # transformers renames on loading, so only the ends of the names are compared
    ends = [{".".join(name.split(".")[-2:]) for name in names} for names in (stored, expected)]
    if not ends[0] & ends[1]:
        raise InputError(
            f"the weights in {folder} are no weights of model_type {config.model_type!r}: there is "
            f"{', '.join(sorted(stored)[:3])}, it has {', '.join(list(expected)[:3])}. config.json "
            "belongs to another model."
        )


def _check_loaded(folder: Path, module: nn.Module, info: dict[str, Any]) -> list[str]:
    """Names of weights that the class has no use for; anything else that does not fit raises."""
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [
        f"{name} is {tuple(saved)} instead of {tuple(expected)}"
        for name, saved, expected in sorted(info["mismatched_keys"])
    ]
    # a layer too many is a wrong configuration; a head that this class lacks is no harm
    patterns = {re.sub(r"\d+", "*", name) for name in module.state_dict()}
    layers = [name for name in extra if re.sub(r"\d+", "*", name) in patterns]
    errors = [str(error) for error in info.get("error_msgs", ())]
    problems = []
    titles = {"missing": missing, "not expected": layers, "misshapen": shapes, "failed": errors}
    for title, names in titles.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{title}: {', '.join(names[:8])}{more}")
    if problems:
        raise InputError(
            f"the weights in {folder} do not fit {type(module).__name__}; {'; '.join(problems)}. "
            "The configuration belongs to other weights, or a file is damaged."
        )
    return extra


def _tokenizer(folder: Path, remote: bool) -> Any:
    plain = read_tokenizer(folder / "tokenizer.json")
    if plain is not None or not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        return plain
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return usable_tokenizer(
                AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=remote
                )
            )
    except Exception as error:  # whatever a damaged file makes of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"the tokenizer in {folder} cannot be read ({reason}); the model takes token ids only.",
            stacklevel=2,
        )
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, reports or deprecation notes of transformers meanwhile."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub = (
        logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled(),
    )  # fmt: skip
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        elif not hub:
            enable_progress_bars()
