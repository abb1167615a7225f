"""Hugging Face ids: a folder on this machine, from the local cache or else the network."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loopscope.errors import InputError, UnknownNameError
from loopscope.models.native import read_json, weight_files

_SMALL = ("*.json", "*.toml", "*.model", "*.txt", "*.tiktoken")
_CODE = ("*.py",)


def hub_folder(name: str, *, weights: bool, code: bool) -> Path:
    """The snapshot of a model, complete as far as it is asked for.

    Args:
        name: `org/name`, or a single name.
        weights: Whether the weights are needed; otherwise only configuration and tokenizer.
        code: Whether Python files are needed (remote code that the user trusts).

    Returns:
        The folder in the local cache; the network is used only for what is not there.

    Raises:
        InputError: if it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if _complete(folder, weights=weights, code=code):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    return _download(name, weights=weights, code=code)


def _complete(folder: Path, *, weights: bool, code: bool) -> bool:
    if not (folder / "config.json").is_file():
        return False
    if code and not any(folder.glob("*.py")) and "auto_map" in read_json(folder / "config.json"):
        return False
    try:
        return not weights or bool(weight_files(folder))
    except InputError:
        return False


def _download(name: str, *, weights: bool, code: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise UnknownNameError(
            f"{_unknown(name)}it is not (completely) in the local cache, while HF_HUB_OFFLINE or "
            f"TRANSFORMERS_OFFLINE forbids the network. {_remedy(name)}"
        )
    try:
        listed = HfApi().model_info(name, timeout=10.0).siblings or []
        files = _choose([file.rfilename for file in listed], weights=weights, code=code)
        return Path(snapshot_download(name, allow_patterns=files))
    except HfHubHTTPError as error:
        raise _refusal(name, error) from error
    except Exception as error:
        # httpx's errors are no OSErrors
        client = type(error).__module__.startswith(("httpx", "httpcore", "requests"))
        if not (client or isinstance(error, OSError)):
            raise
        raise UnknownNameError(
            f"{_unknown(name)}it is not (completely) in the local cache and the Hub cannot be "
            f"reached ({_first_line(error)}). {_remedy(name)}"
        ) from error


def _refusal(name: str, error: Any) -> InputError:
    """What the Hub's answer to a request for a model means."""
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return UnknownNameError(
            f"{_unknown(name)}the Hub does not give it: it does not exist, or is private or gated; "
            "log in with `hf auth login` and accept its licence if it has one."
        )
    if status == 404:
        return UnknownNameError(f"{_unknown(name)}the Hub knows no model of this name.")
    return InputError(f"{name} cannot be downloaded: {_first_line(error)}. {_remedy(name)}")


def _unknown(name: str) -> str:
    return f"unknown model {name!r}; there is no such folder, and as a Hugging Face id "


def _remedy(name: str) -> str:
    return f"Download it where there is a network (hf download {name}), or give a folder."


def _choose(files: list[str], *, weights: bool, code: bool) -> list[str]:
    """The files to download: safetensors where there are any, otherwise pickled tensors."""
    top = [file for file in files if "/" not in file]
    chosen = [f for f in top if any(fnmatch(f, p) for p in _SMALL + (_CODE if code else ()))]
    if weights:
        safe = [f for f in top if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", f)]
        pickled = [f for f in top if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", f)]
        chosen += safe or pickled
    return chosen


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
