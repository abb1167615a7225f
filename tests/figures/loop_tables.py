"""Synthetic tables of models with several loops, with gates, and with routers of other ports."""

import numpy as np
import pandas as pd

from loopscope.analysis.tables.frames import Tables, stack


def gate_frames(
    gates: dict[str, list[int]], tokens: list[str], samples: int = 40, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """The tables routing and tokens of gates: name → iterations at which it is evaluated."""
    rng = np.random.default_rng([seed, 7])
    mean, seen = [], []
    for name, steps in gates.items():
        for t in steps:
            p = np.clip(rng.normal(0.2 + 0.15 * t, 0.05, samples), 0.01, 0.99)
            entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
            key = {"kind": "gate", "t": t, "target": name}
            mean.append(
                pd.DataFrame({"sample": range(samples), **key, "mean": p, "entropy": entropy})
            )
            values = rng.uniform(0, 1, len(tokens))
            seen.append(
                pd.DataFrame(
                    {"sample": 0, **key, "pos": range(len(tokens)), "token": tokens}
                ).assign(value=values)
            )
    routing = pd.concat(mean, ignore_index=True).astype({"t": np.int16})
    types = {"t": np.int16, "pos": np.int32, "value": np.float32}
    return {"routing": routing, "tokens": pd.concat(seen, ignore_index=True).astype(types)}


def join(name: str, loops: dict[str, Tables], paths: dict[str, list[str]]) -> Tables:
    """Several loops of one model: the tables of each, and where its iterations stand."""
    frames: dict[str, list[pd.DataFrame]] = {}
    for loop, tables in loops.items():
        for table, frame in tables.frames().items():
            if table == "loss" and "loss" in frames:
                continue
            own = frame.assign(
                model=pd.Categorical([name] * len(frame)), loop=pd.Categorical([loop] * len(frame))
            )
            frames.setdefault(table, []).append(own[frame.columns])
    told = {"loops": [{"name": loop, "paths": paths[loop]} for loop in loops]}
    return Tables(
        **{table: stack(parts) for table, parts in frames.items()},
        provenance={"models": {name: {"map": told}}},
    )


def nested(make, name: str = "hrm", **options) -> Tables:
    """An outer loop H of two cycles, an inner one L of three in each."""
    paths = {"H": ["H0", "H1"], "L": [f"H{a}.L{b}" for a in (0, 1) for b in (0, 1, 2)]}
    loops = {"H": make(name, K=2, **options), "L": make(name, K=6, seed=1, **options)}
    return join(name, loops, paths)
