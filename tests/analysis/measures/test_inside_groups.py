"""Looking inside models that loop as often as their input asks for: each group by its own."""

import numpy as np
import pandas as pd
import pytest
import torch

import loopscope as ls
from loopscope.analysis.measuring.streaming import Measuring
from loopscope.analysis.options import Options
from loopscope.errors import InputError
from tests.conftest import make_model
from tests.standins import traps


@pytest.fixture(scope="module")
def adaptive():
    tokens = torch.randint(61, (8, 9), generator=torch.Generator().manual_seed(3))
    return ls.wrap(traps.Adaptive(), example=tokens[:1]), tokens


def options(**intervene):
    return Options(measures=["intervene"], intervene=intervene)


def test_parts_of_samples_of_several_numbers_of_loops_are_those_of_the_whole(adaptive):
    model, tokens = adaptive
    how = options(what="loop1", how="mean")
    whole = Measuring(model, tokens, how, batch_size=1).part(0, 8).effect
    part = Measuring(model, tokens, how, batch_size=1).part(0, 1).effect
    first = whole[whole["sample"].eq(0)]
    pd.testing.assert_frame_equal(
        first.reset_index(drop=True).astype({"loop": str}), part.astype({"loop": str}),
        check_categorical=False,
    )  # fmt: skip


def test_effects_stand_with_the_loop_of_their_number_of_iterations(adaptive):
    model, tokens = adaptive
    tables = ls.measure(
        model, tokens, ["loss", "intervene"], batch_size=3,
        intervene={"what": "iteration", "how": ["skip", "mean"]},
    )  # fmt: skip
    loops = tables.loss.set_index("sample")["loop"].astype(str)
    assert loops.nunique() == 3
    effect = tables.effect
    assert (effect["loop"].astype(str) == effect["sample"].map(loops).astype(str)).all()


def test_sources_and_answers_go_along_with_their_samples(adaptive):
    model, tokens = adaptive
    frame = ls.intervene(
        model, tokens, "loop1", "patch", source=tokens, answers=tokens[:, 0], batch_size=2
    ).effect
    patched = frame[frame["what"].eq("loop1")]
    assert len(patched) == 8 and (patched["loss"] == 0).all()  # each from itself
    top = {i: int(model.wrapped_on(tokens[i : i + 1])(tokens[i : i + 1])[0, -1].argmax())
           for i in range(8)}  # fmt: skip
    right = {i: float(top[i] == int(tokens[i, 0])) for i in range(8)}
    assert patched.set_index("sample")["interchange"].to_dict() == right


def test_labels_of_single_tokens_go_along_with_their_samples(adaptive):
    model, tokens = adaptive
    rows = [(s, p, "ab"[int(tokens[s, p]) % 2]) for s in range(8) for p in range(9)]
    listed = pd.DataFrame(rows, columns=["sample", "pos", "kind"])
    dense = {"kind": (tokens % 2).numpy()}
    frames = [
        ls.intervene(model, tokens, "loop0", "erase", labels=labels, batch_size=2).effect
        for labels in (listed, dense)
    ]
    values = [frame[frame["how"].eq("erase")].set_index("sample")["loss"] for frame in frames]
    pd.testing.assert_series_equal(*values)


def test_hooks_act_in_what_is_prepared_too():
    model = make_model("base", "1+2R3+1").double()
    tokens = torch.randint(61, (6, 10), generator=torch.Generator().manual_seed(3))
    model.add_hook("loop.1.hook_out", lambda x, hook: x * 3)
    plain, more = (
        ls.measure(model, tokens, ["orbit"], more_loops=T, orbit={"contraction_samples": 0})
        for T in (None, 5)
    )
    for table in ("early_exit", "orbit_path"):
        pd.testing.assert_frame_equal(getattr(plain, table), getattr(more, table))


def test_two_equal_sources_have_no_weights_of_their_own():
    model = make_model("static", "0+1R3+0").double()
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))
    tables = ls.intervene(model, tokens, "edge", "zero")
    (notes,) = [entry["notes"] for entry in tables.provenance["models"].values()]
    assert not len(tables.effect)
    assert any("h(0) is h_emb, so the weights of the two cannot be told apart" in n for n in notes)
    with pytest.raises(InputError):
        ls.intervene(model, tokens, "h_emb>h1", "zero")


def test_a_path_ends_where_the_last_state_is_of_another_kind():
    class Injected(torch.nn.Module):
        """x + e enters each iteration, and the coda reads what the last one gives."""

        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(61, 16)
            self.core = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh())
            self.head = torch.nn.Linear(16, 61)

        def forward(self, tokens):
            e = x = self.embed(tokens)
            for _ in range(5):
                x = self.core(x + e)
            return self.head(x)

    torch.manual_seed(0)
    tokens = torch.randint(61, (3, 9))
    model = ls.wrap(Injected(), example=tokens[:1])
    tables = ls.orbit(model, tokens, contraction_samples=0)
    (notes,) = [entry["notes"] for entry in tables.provenance["models"].values()]
    assert any("paths end at h(K−1)" in note for note in notes)
    frame = tables.orbit[tables.orbit["part"].eq("core") & tables.orbit["view"].eq("state")]
    assert set(frame.loc[frame["t"].eq(5), "flag"]) == {"shape"}
    h = [state.double() for state in model.capture(tokens).h]
    step = ((h[4] - h[3]).norm(dim=-1) / h[3].norm(dim=-1)).mean(1)
    assert frame.loc[frame["t"].eq(3), "size"].to_numpy() == pytest.approx(step.numpy(), rel=1e-5)
    assert frame.loc[frame["t"].eq(4), "size"].isna().all()


def test_labels_of_text_are_left_out_where_the_tokenizer_cannot_decode():
    model = make_model("base", "1+1R2+1")

    model.tokenizer = lambda text: [ord(letter) % 61 for letter in text]
    tokens = torch.randint(61, (6, 12), generator=torch.Generator().manual_seed(3))
    tables = ls.probe(model, tokens)
    (notes,) = [entry["notes"] for entry in tables.provenance["models"].values()]
    assert any("has no decode" in n and "no current, previous, next labels" in n for n in notes)
    assert set(tables.probe["labels"]) == {"position"}


def test_labels_of_one_value_are_said_to_mean_nothing():
    model = make_model("base", "1+1R2+1")
    tokens = torch.randint(61, (6, 12), generator=torch.Generator().manual_seed(3))
    labels = {"same": np.ones((6, 12), dtype=int), "none": np.full((6, 12), np.nan)}
    tables = ls.probe(model, tokens, labels)
    (notes,) = [entry["notes"] for entry in tables.provenance["models"].values()]
    text = "; ".join(notes)
    assert "labels 'same' have one value, so their scores mean nothing" in text
    assert "labels 'none' have no value" in text
