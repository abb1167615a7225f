"""Looking inside models that loop as often as their input asks for: each group by its own."""

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
