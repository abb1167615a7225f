"""Counted tokens: the predictions that a loss is taken of, where not all of them are asked for."""

from typing import Any

import numpy as np
from jaxtyping import Bool

from loopscope.analysis.measures.filling import SampleSet
from loopscope.errors import InputError, unknown_name
from loopscope.models import Hooked
from loopscope.probes import labels_of_text
from loopscope.text import CLASSES


def counted_tokens(
    model: Hooked, samples: SampleSet, where: Any
) -> Bool[np.ndarray, "sample pos"] | None:
    """Tell of each token whether its prediction counts.

    Args:
        model: The model, for its tokenizer.
        samples: Windows of tokens.
        where: A class of tokens (`text.CLASSES`), or booleans (samples × tokens): which tokens
            count as predicted; the first of a window never is. None for all.

    Returns:
        (samples, pos); None for all.

    Raises:
        UnknownNameError: for a class that does not exist, with near matches.
        InputError: for a class where the model has no tokenizer, or booleans of another shape.
    """
    tokens = samples.tokens
    if where is None or tokens is None:
        return None
    if not isinstance(where, str):
        counted = np.asarray(where)
        if counted.dtype != bool or counted.shape != tuple(tokens.shape):
            raise InputError(
                f"where has {counted.dtype} of shape {counted.shape}; give booleans of shape "
                f"{tuple(tokens.shape)} (samples, tokens), or a class: {', '.join(CLASSES)}."
            )
        return counted
    if where not in CLASSES:
        raise unknown_name("class of tokens", where, CLASSES)
    if model.tokenizer is None:
        raise InputError(
            f"{model.name!r} has no tokenizer, so which of its tokens are {where!r} is not known; "
            "give booleans (samples × tokens)."
        )
    labels, _ = labels_of_text(model.tokenizer, tokens.tolist(), ["current"])
    return labels["current"].values == CLASSES.index(where)


__all__ = ["counted_tokens"]
