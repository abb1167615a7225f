"""What a model is made of, as plain data: for `inspect` and Jupyter."""

from html import escape
from typing import Any

from loopscope.models.native.loop_model import LoopModel
from loopscope.models.native.parameter_counts import count_model


def describe(model: Any) -> dict[str, Any]:
    """Facts about a model, native or wrapped.

    Returns:
        Name, variant, layout, widths, parameter counts, memory slots, the roles of the virtual
        layers, the states a trajectory has, and what the model was trained on, if known.
    """
    if not isinstance(model, LoopModel):
        from loopscope.models.wrapped.description import describe_wrapped

        return describe_wrapped(model)
    config, layout = model.config, model.config.layout
    counts = count_model(model)
    roles = [("prelude", 0, layout.prelude)]
    roles += [(f"core{t + 1}", layout.core_start(t), layout.cores[t]) for t in range(layout.K)]
    roles += [("coda", layout.core_start(layout.K), layout.coda)]
    facts: dict[str, Any] = {
        "name": model.name,
        "variant": config.variant,
        "layout": str(layout),
        "iterations K": config.K,
        "layers": f"{layout.n_param_layers} of parameters, {layout.n_layers} of compute",
        "width": f"d_model {config.d_model}, {config.n_heads} heads, d_mlp {config.d_mlp}",
        "vocabulary": config.d_vocab,
        "context": config.n_ctx,
        "parameters": f"{counts.total:,} ({counts.non_embedding:,} non-embedding)",
    }
    if config.variant == "mesh":
        facts["memory"] = (
            f"{config.slots} slots, {counts.router:,} router parameters, transition looks at the "
            f"{config.transition_query}"
        )
    facts["roles"] = "; ".join(
        f"{role}: blocks {start}…{start + depth - 1}" if depth > 1 else f"{role}: block {start}"
        for role, start, depth in roles
        if depth
    )
    facts["states"] = "h_emb, " + ", ".join(f"h{t}" for t in range(config.K + 1)) + ", h_out"
    facts["dtype, device"] = f"{str(model.cfg.dtype).removeprefix('torch.')}, {model.cfg.device}"
    facts["tokenizer"] = "yes" if model.tokenizer is not None else "none: token ids only"
    if model.provenance.get("untrained"):
        facts["training"] = f"none (untrained twin, seed {model.provenance.get('seed')})"
    elif isinstance(model.provenance.get("tokens"), int):
        facts["training"] = f"{model.provenance['tokens']:,} tokens"
    return facts


def hook_names(model: Any) -> list[tuple[str, str]]:
    """All hook names, grouped: repeated indices are written {v} and {t}.

    Returns:
        (pattern, how many points it stands for).
    """
    if not isinstance(model, LoopModel):
        from loopscope.models.wrapped.description import address_patterns

        return [(name, str(n)) for name, n in address_patterns(model.map, model.hook_dict).items()]
    groups: dict[str, int] = {}
    for name in model.hook_dict:
        first, _, rest = name.partition(".")
        index, _, tail = rest.partition(".")
        if first in ("blocks", "loop") and index.isdigit():
            name = f"{first}.{{{'v' if first == 'blocks' else 't'}}}.{tail}"
        groups[name] = groups.get(name, 0) + 1
    return [(name, str(n)) for name, n in groups.items()]


def to_html(facts: dict[str, Any]) -> str:
    """A two-column HTML table."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(str(k))}</th>"
        f"<td style='text-align:left'>{escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    return f"<table>{rows}</table>"
