"""Hand-made tables of interventions: places of a model with memory, or without."""

import numpy as np
import pandas as pd

from loopscope.analysis.tables import Tables


def place_names(K: int, B: int, heads: int = 0) -> list[tuple[str, str, int]]:
    """(what, kind, t) of every place of a model with K iterations and B slots (0: none)."""
    places = [(f"loop{t}", "iteration", t) for t in range(K)]
    places += [(f"loop{t}.attn", "attention", t) for t in range(K)]
    places += [(f"loop{t}.mlp", "mlp", t) for t in range(K)]
    for kind, prefix in (("slot", ""), ("write", "write "), ("read", "read ")):
        places += [(f"{prefix}m{b}@{t}", kind, t) for t in range(-1, K) for b in range(B)]
    if B:
        for t in range(-1, K):
            sources = ["h_emb", "prelude", *(f"h_m{i}" for i in range(t + 1))]
            places += [(f"{source}>h{t + 1}", "edge", t) for source in sources]
    places += [(f"loop{t}.layer0.head{n}", "head", t) for t in range(K) for n in range(heads)]
    return places


def effect_table(
    name: str = "mesh",
    *,
    K: int = 3,
    B: int = 6,
    heads: int = 0,
    samples: int = 16,
    hows: tuple[str, ...] = ("mean",),
    documents: bool = True,
    seed: int = 0,
    scale: float = 1.0,
) -> Tables:
    """Make the table of one model; effects grow with masses, with noise by place and sample."""
    rng = np.random.default_rng(seed)
    rows = []
    for what, kind, t in place_names(K, B, heads):
        mass = rng.uniform(0.01, 0.9) if kind != "iteration" else 1.0 - 0.2 * t
        size = scale * mass**2 * rng.lognormal(-1, 1) + (2.0 * scale if kind == "iteration" else 0)
        for how in ("skip",) if kind == "iteration" else hows:
            for routers in ("recomputed", "frozen") if B else ("recomputed",):
                shrunk = size * (0.6 if routers == "frozen" else 1.0)
                for sample in range(samples):
                    loss = shrunk * rng.normal(1, 0.4) - 0.003 * scale * rng.uniform()
                    key = (sample, what, kind, t, how, routers)
                    shown = mass * rng.normal(1, 0.05)
                    rows.append((*key, loss, abs(loss) * 1.2, min(1.0, abs(loss)), shown, 9 * mass))
    columns = ["sample", "what", "kind", "t", "how", "routers", "loss", "kl", "changed"]
    frame = pd.DataFrame(rows, columns=[*columns, "mass", "mass_norm"])
    return as_tables(frame.assign(interchange=np.nan), name, documents=documents)


def as_tables(frame: pd.DataFrame, name: str = "mesh", *, documents: bool = True) -> Tables:
    """Put the common columns first."""
    n = len(frame)
    of_sample = [f"file{s}.py" if documents else None for s in frame["sample"]]
    common = pd.DataFrame(
        {
            "model": pd.Categorical([name] * n),
            "step": pd.array([None] * n, dtype="Int64"),
            "sample": frame["sample"].astype(np.int32),
            "document": pd.Categorical(of_sample),
            "loop": pd.Categorical(["core"] * n),
            "flag": pd.Categorical([None] * n, ["nonfinite"]),
        }
    )
    rest = frame.drop(columns="sample").astype(
        {c: "category" for c in ("what", "kind", "how", "routers")} | {"t": "int16"}
    )
    return Tables(effect=common.join(rest), provenance={})
