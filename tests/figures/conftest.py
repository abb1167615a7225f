"""Synthetic tables with the shape of real ones: unequal models, flagged rows, several K."""

import numpy as np
import pandas as pd
import pytest

from loopscope.analysis.tables.frames import Tables

TEXT = [
    *["def", " load", "(", "path", ":", " str", ")", " ->", " dict", ":", "\n    ", '"""'],
    *["Read", " a", " file", ".", '"""', "\n\n", "\t", "    return", " json", ".", "loads", "("],
    *["Path", "(", "path", ").", "read", "_", "text", "(", "encoding", "='", "utf", "-", "8"],
    *["'", "))", " # $", "x", "\ufffd", "日本", "        ", "longidentifiername", "", "\x00"],
]
PULL = {"base": 0.25, "residual": 0.45, "anchor": 0.6, "mesh": 0.9}


def states(K: int) -> list[str]:
    return ["h_emb", *(f"h{t}" for t in range(K + 1)), "h_out"]


def category(values, categories=None) -> pd.Categorical:
    return pd.Categorical(values, categories=categories)


def finish(frame: pd.DataFrame, name: str, step: int | None) -> pd.DataFrame:
    """Put the common columns first, with the table's dtypes."""
    n = len(frame)
    common = {
        "model": category([name] * n),
        "step": pd.array([step] * n, dtype="Int64"),
        "sample": frame["sample"].astype(np.int32),
        "document": category([None] * n),
        "loop": category(["core"] * n),
        "flag": category(
            frame.get("flag", pd.Series([None] * n)), ["zero", "short", "nonfinite", "shape"]
        ),
    }
    rest = frame.drop(columns=["sample", "flag"], errors="ignore")
    for column in ("state", "block", "kernel", "estimator", "measure", "kind", "target", "token"):
        if column in rest:
            rest[column] = category(rest[column])
    return pd.DataFrame(common).join(rest)


def tidy(array: np.ndarray, names: dict[str, list], values: str = "value") -> pd.DataFrame:
    """Spread (sample, …) into rows."""
    levels = [list(range(len(array))), *names.values()]
    index = pd.MultiIndex.from_product(levels, names=["sample", *names])
    return pd.DataFrame({values: array.ravel()}, index=index).reset_index()


def make(
    name: str,
    *,
    K: int = 3,
    B: int | None = None,
    samples: int = 40,
    step: int | None = None,
    seed: int = 0,
    pull: float | None = None,
    flagged: int = 0,
    plain: bool = False,
) -> Tables:
    """Make the tables of one model; `plain` is a stack without loop."""
    rng = np.random.default_rng([seed, *name.encode()])
    pull = PULL.get(name, 0.5) if pull is None else pull
    K = 0 if plain else K
    names = states(K)
    blocks = ["prelude"] if plain else ["prelude", *(f"core{t + 1}" for t in range(K)), "coda"]
    height = np.array([1.2, *(1.4 * pull**t for t in range(K)), 1.1])[: len(blocks)]
    update = tidy(rng.normal(height, 0.12 * height, (samples, len(blocks))), {"block": blocks})
    update["t"] = np.tile(np.array([-1, *range(K), K], np.int16)[: len(blocks)], samples)
    update["flag"] = None
    if flagged:
        update.loc[update.index[:flagged], "flag"] = "zero"

    depth = np.array([0, *(1.5 + pull * t for t in range(K + 1)), 3 + pull * K])
    far = np.abs(depth[:, None] - depth[None])
    pairs = np.triu_indices(len(names))
    parts = []
    for kernel in ("rbf", "linear"):
        for estimator, shift in (("biased", 0.0), ("debiased", 0.12)):
            mean = (
                np.exp(-0.6 * far[pairs]) * (1 + shift * (far[pairs] > 0))
                - shift * (far[pairs] > 0) * 1.3
            )
            noise = 0.02 * rng.normal(size=(samples, len(mean))) * (far[pairs] > 0)
            part = tidy(mean + noise, {"pair": list(range(len(mean)))})
            part["state_a"] = category([names[a] for a in pairs[0]] * samples, names)
            part["state_b"] = category([names[b] for b in pairs[1]] * samples, names)
            parts.append(part.drop(columns="pair").assign(kernel=kernel, estimator=estimator))
    cka = pd.concat(parts, ignore_index=True)
    cka = cka[["sample", "state_a", "state_b", "kernel", "estimator", "value"]]
    cka["flag"] = None
    if flagged:
        cka.loc[cka.index[1], ["value"]] = np.nan

    rate = np.array([0.035, *(0.05 + 0.05 * (1 - pull) * t for t in range(K + 1)), 0.045])
    i = np.arange(50)
    logs = -rate[:, None] * i - 0.4 * (i > 0)
    logs = logs * (1 + 0.1 * rng.normal(size=(samples, len(names), 1)))
    spectrum = tidy(logs.astype(np.float32), {"state": names, "i": list(i)}, "log10_sigma_rel")
    spectrum["i"] = spectrum["i"].astype(np.int16)
    spectrum.insert(3, "sigma_rel", 10 ** spectrum["log10_sigma_rel"])

    size = 90 / (1 + 20 * rate[:, None] * [1.0, 3.0, 2.0])
    ranks = size * (1 + 0.05 * rng.normal(size=(samples, len(names), 3)))
    rank = tidy(ranks, {"state": names, "measure": ["effective", "stable", "participation"]})

    frames = {"update": update, "cka": cka, "spectrum": spectrum, "rank": rank}
    frames["loss"] = pd.DataFrame({"sample": range(samples), "value": rng.normal(3, 0.2, samples)})
    if B is not None:
        frames |= router_frames(rng, K, B, samples)
    done = {key: finish(frame, name, step) for key, frame in frames.items()}
    return Tables(**{"routing": None, "tokens": None, **done}, provenance={})


def router_frames(rng, K: int, B: int, samples: int) -> dict[str, pd.DataFrame]:
    def weights(count):
        z = 2.2 * rng.normal(size=(K + 1, 1, B)) + 1.2 * rng.normal(size=(K + 1, count, B))
        w = np.exp(z)
        return w / w.sum(-1, keepdims=True)

    rows, slots = [], [f"m{b}" for b in range(B)]
    for kind in ("write", "read"):
        w = weights(samples)
        entropy = -(w * np.log(w)).sum(-1, keepdims=True)
        part = tidy(
            np.moveaxis(w, 1, 0), {"t": list(range(-1, K)), "target": slots}, "mean"
        ).assign(kind=kind)
        part["entropy"] = np.broadcast_to(np.moveaxis(entropy, 1, 0), (samples, K + 1, B)).ravel()
        rows.append(part)
    for t in range(-1, K):
        sources = ["h_emb", "prelude", *(f"core{i + 1}" for i in range(t + 1))]
        part = tidy(rng.uniform(0, 0.8, (samples, 1, len(sources))), {"t": [t], "target": sources})
        rows.append(part.rename(columns={"value": "mean"}).assign(kind="alpha", entropy=np.nan))
    routing = pd.concat(rows, ignore_index=True)
    routing["t"] = routing["t"].astype(np.int16)
    routing = routing[["sample", "kind", "t", "target", "mean", "entropy"]]
    parts = []
    for kind in ("write", "read"):
        w = weights(len(TEXT))
        names = {"t": list(range(-1, K)), "pos": list(range(len(TEXT))), "target": slots}
        parts.append(tidy(w[None], names).assign(kind=kind))
    tokens = pd.concat(parts, ignore_index=True)
    tokens["token"] = [TEXT[p] for p in tokens["pos"]]
    tokens = tokens.astype({"t": np.int16, "pos": np.int32, "value": np.float32})
    return {
        "routing": routing,
        "tokens": tokens[["sample", "kind", "t", "target", "pos", "token", "value"]],
    }


@pytest.fixture(scope="session", name="make")
def _make():
    return make


@pytest.fixture(scope="session")
def four() -> Tables:
    """The paper's four models, one flagged."""
    return Tables.concat(
        [make("base"), make("residual"), make("anchor", flagged=3), make("mesh", B=6)]
    )


@pytest.fixture(scope="session")
def mixed() -> Tables:
    """A grouped vanilla model, a plain stack, and looped models of other K."""
    return Tables.concat(
        [
            make("vanilla", K=2, samples=7),
            make("plain", plain=True),
            make("mesh", B=6),
            make("org/deep mesh@init", K=5, B=8),
        ]
    )


@pytest.fixture(scope="session")
def series() -> Tables:
    """One model at three steps of its training."""
    parts = [make("mesh", B=6, step=step, seed=step) for step in (0, 1000, 20000)]
    frames = {
        name: pd.concat([p.frames()[name] for p in parts], ignore_index=True)
        for name in ("update", "cka", "spectrum", "rank", "routing", "tokens")
    }
    return Tables(**frames)
