"""Lenses: against logits computed by hand, scipy, torch's own divergences, and TransformerLens."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from transformer_lens.tools.analysis import logit_lens

import loopscope as ls
from loopscope.models.native.loop_model import LoopModel
from loopscope.probes import lenses
from loopscope.probes.lenses import (
    OWN,
    VALUES,
    Comparer,
    LensReader,
    layer_states,
    lens_states,
    lens_values,
    samples_at_once,
    top_tokens,
    why_no_coda_lens,
    why_no_logit_lens,
)
from tests.conftest import make_model
from tests.models.wrapped.small import Small
from tests.standins import heads

TOKENS = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(5))


def sharp(variant="mesh", layout="1+2R3+1", **changes) -> LoopModel:
    """A model whose predictions differ from token to token."""
    return make_model(variant, layout, noise=0.3, **changes)


def read(model, kinds=("logit", "coda"), tokens=TOKENS, **reader):
    """Trajectory, and `lens_values` with each value by its name."""
    trajectory = model.capture(tokens, logits=True)
    values = lens_values(LensReader(model, trajectory, **reader), lens_states(kinds, trajectory.K))
    return trajectory, {key: dict(zip(VALUES, value, strict=True)) for key, value in values.items()}


@torch.no_grad()
def by_hand(model, trajectory, kind, state) -> torch.Tensor:
    """Log-probabilities of a native model's lens."""
    h = trajectory.states[state]
    if kind == "coda":
        hooks = [("coda.hook_in", lambda x, hook: h)]
        logits = model.run_with_hooks(trajectory.tokens, fwd_hooks=hooks)
    else:
        logits = F.linear(
            F.layer_norm(h, h.shape[-1:], model.ln_final.weight, model.ln_final.bias,
                         model.config.ln_eps),
            model.unembed.weight,
        )  # fmt: skip
    return logits.double().log_softmax(-1)


CASES = [("logit", "h_emb"), ("logit", "h1"), ("logit", "h3"), ("coda", "h0"), ("coda", "h2")]


@pytest.mark.parametrize(("kind", "state"), CASES)
def test_kl_is_from_the_final_prediction_to_the_lens_and_not_the_other_way(kind, state):
    model = sharp()
    trajectory, values = read(model)
    final = by_hand(model, trajectory, "logit", "h_out")
    q = by_hand(model, trajectory, kind, state)
    forward = F.kl_div(q, final, reduction="none", log_target=True).sum(-1)
    backward = F.kl_div(final, q, reduction="none", log_target=True).sum(-1)
    found = values[kind, state]["kl_final"]
    torch.testing.assert_close(found, forward, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(found, entropy(final.exp(), q.exp(), axis=-1), rtol=1e-4, atol=2e-6)
    assert (found - backward).abs().max() > 1e-3  # the directions differ here


def test_kl_next_is_from_the_next_states_prediction_to_this_ones():
    model = sharp("residual")
    trajectory, values = read(model)
    for kind, course in (
        ("logit", ["h_emb", "h0", "h1", "h2", "h3", "h_out"]),
        ("coda", ["h_emb", "h0", "h1", "h2", "h3"]),
    ):
        for this, after in pairwise(course):
            q = by_hand(model, trajectory, kind, this)
            p = by_hand(model, trajectory, kind, after)
            wanted = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            found = values[kind, this]["kl_next"]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)
        assert values[kind, course[-1]]["kl_next"].isnan().all()


@pytest.mark.parametrize(("kind", "state"), CASES)
def test_entropy_loss_and_top_token_are_those_of_the_lens(kind, state):
    model = sharp("anchor")
    trajectory, values = read(model)
    q = by_hand(model, trajectory, kind, state)
    found = values[kind, state]
    np.testing.assert_allclose(found["entropy"], entropy(q.exp(), axis=-1), rtol=1e-5)
    wanted = F.cross_entropy(
        q[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    ).view(3, -1)
    torch.testing.assert_close(found["loss"][:, :-1], wanted, rtol=1e-5, atol=1e-6)
    assert found["loss"][:, -1].isnan().all()
    assert torch.equal(found["top"].long(), q.argmax(-1))


def test_ranks_are_places_in_torchs_argsort():
    model = sharp("base")
    trajectory, values = read(model)
    final = by_hand(model, trajectory, "logit", "h_out").argmax(-1)
    for kind, state in CASES:
        order = by_hand(model, trajectory, kind, state).argsort(-1, descending=True)
        found = values[kind, state]
        place = (order == final[..., None]).double().argmax(-1) + 1
        assert torch.equal(found["rank_final"], place.double())
        place = (order[:, :-1] == TOKENS[:, 1:, None]).double().argmax(-1) + 1
        assert torch.equal(found["rank_true"][:, :-1], place.double())
        assert found["rank_true"][:, -1].isnan().all()


def test_tied_tokens_share_the_best_rank_and_the_lowest_number_is_the_top():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    comparer = Comparer()
    prediction = comparer.prediction(logits)
    assert prediction.top.tolist() == [1, 0]
    assert comparer.rank(prediction.log_p, torch.tensor([2, 3])).tolist() == [1.0, 1.0]
    assert comparer.rank(prediction.log_p, torch.tensor([0, 0])).tolist() == [3.0, 1.0]


def test_masked_tokens_have_no_share_in_a_divergence_and_nan_stays():
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 1.0, torch.nan]])
    comparer = Comparer()
    p = comparer.prediction(logits)
    q = comparer.prediction(torch.tensor([[2.0, 2.0, -torch.inf], [0.0, 0.0, 0.0]]))
    kl = p.negentropy - comparer.expected(p.p, q.log_p)
    assert kl[0].item() == pytest.approx(entropy([1, np.e], [1, 1]), rel=1e-6)
    assert kl[1].isnan() and p.top.tolist() == [1, -1]
    assert comparer.rank(p.log_p, torch.tensor([1, 1])).isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["native", "wrapped"])
def test_the_final_states_own_lens_is_the_models_loss_and_its_kl_is_zero(kind, dtype):
    model = sharp(d_vocab=300).to(dtype) if kind == "native" else ls.wrap(
        Small().to(dtype), example=TOKENS
    )  # fmt: skip
    trajectory, values = read(model)
    logits = model(TOKENS)
    logits = logits if dtype == torch.float64 else logits.float()
    for key in (OWN, ("logit", "h_out"), ("coda", f"h{trajectory.K}")):
        found = values[key]
        wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(),
                                 reduction="none").view(3, -1)  # fmt: skip
        assert torch.equal(found["loss"][:, :-1], wanted.double())
        assert (found["kl_final"] == 0).all()
        assert (found["rank_final"] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unembedding_h_out_gives_the_models_logits_bit_for_bit(dtype):
    model = sharp("static", d_vocab=300).to(dtype)
    trajectory = model.capture(TOKENS, logits=True)
    with torch.no_grad():  # as many rows at once as in the model: of fewer, sums round otherwise
        [logits] = model.unembed_state(trajectory.h_out.flatten(0, 1)[None])
        assert torch.equal(logits, model(TOKENS).flatten(0, 1))
    assert why_no_logit_lens(model, trajectory) == why_no_coda_lens(model, trajectory) == ""


@pytest.mark.parametrize("name", ["vanilla", "base"])
def test_the_logit_lens_is_transformer_lenses(name):
    model = ls.load(name)
    tokens = torch.randint(2048, (1, 12), generator=torch.Generator().manual_seed(0))
    theirs = logit_lens(model, tokens, positions=None)
    further = layer_states(model, tokens)
    trajectory = model.capture(tokens, logits=True)
    reader = LensReader(model, trajectory, further)
    lenses_read = lens_states(["logit"], model.K, layers=list(further))
    logits = {lens.state: reader.logits(lens, slice(None)) for lens in lenses_read}
    # the stream that enters each layer is the embedding, or what the layer before gave
    ours = [logits["h_emb"], *(logits[name] for name in further)]
    assert theirs.labels == [*(f"{v}_pre" for v in range(len(further))), "final_post"]
    for entry, own in zip(theirs.values, ours, strict=True):
        torch.testing.assert_close(entry[0], own, rtol=1e-4, atol=1e-3)


def test_layers_are_the_streams_after_each_layer():
    model = sharp("mesh", "1+2R2+1")
    states = layer_states(model, TOKENS)
    assert list(states) == ["prelude.0", "core1.0", "core1.1", "core2.0", "core2.1", "coda.0"]
    trajectory = model.capture(TOKENS)
    assert torch.equal(states["core1.1"], trajectory.h_m[0])
    assert torch.equal(states["core2.1"], trajectory.h_m[1])
    assert torch.equal(states["coda.0"], trajectory.h_out)
    name = "loop.1.layer.0.hook_resid_post"
    _, cache = model.run_with_cache(TOKENS, names_filter=name)
    assert torch.equal(states["core2.0"], cache[name])


def test_states_are_listed_in_the_order_of_computation():
    layers = ["prelude.0", "core1.0", "core2.0", "coda.0"]
    logit = lens_states(["logit"], 2, layers=layers)
    assert [lens.state for lens in logit] == [
        "h_emb", "prelude.0", "h0", "core1.0", "h1", "core2.0", "h2", "coda.0", "h_out",
    ]  # fmt: skip
    assert [lens.previous for lens in logit] == [None, *(lens.state for lens in logit[:-1])]
    assert [lens.following for lens in logit] == [*(lens.state for lens in logit[1:]), None]
    assert [lens.state for lens in logit if lens.final] == ["h_out"]
    coda = lens_states(["coda"], 2, more=[3, 5], layers=layers)
    assert [lens.state for lens in coda][-4:] == ["core2.0", "h2", "h3", "h5"]
    assert [lens.following for lens in coda][-4:] == ["h2", "h3", "h5", None]
    assert [lens.previous for lens in coda][-2:] == ["h2", "h3"]
    assert [lens.state for lens in coda if lens.final] == ["h2"]
    assert [lens.state for lens in coda if lens.beyond] == ["h3", "h5"]
    assert [lens.state for lens in lens_states(["tuned"], 1)] == ["h_emb", "h0", "h1"]


def test_values_do_not_depend_on_how_tokens_are_shared_between_chunks(monkeypatch):
    model = sharp()
    _, whole = read(model)
    monkeypatch.setattr(lenses, "CHUNK", 1)
    monkeypatch.setattr(lenses, "FEWEST", 4)
    _, parts = read(model)
    for key, values in whole.items():
        for name, value in values.items():
            torch.testing.assert_close(parts[key][name], value, rtol=1e-5, atol=2e-6,
                                       equal_nan=True)  # fmt: skip


def test_a_reader_that_runs_the_whole_model_reads_the_same():
    model = sharp("anchor_emb")
    _, alone = read(model)
    _, whole = read(model, unembeds=False, kinds=("coda",))
    for state in ("h_emb", "h0", "h2"):
        for name in VALUES:
            torch.testing.assert_close(
                whole["coda", state][name], alone["coda", state][name], rtol=1e-5, atol=2e-6,
                equal_nan=True,
            )  # fmt: skip


def test_samples_are_taken_by_parts_where_logits_of_whole_runs_are_held(monkeypatch):
    model = ls.wrap(heads.Scores("capped"), example=TOKENS)
    trajectory = model.capture(TOKENS, logits=True)
    assert samples_at_once(model, trajectory, 5, unembeds=True) == 3
    monkeypatch.setattr(lenses, "WHOLE_RUNS", 5 * trajectory.logits[0].numel())
    assert samples_at_once(model, trajectory, 5, unembeds=True) == 1
    native = sharp()
    assert samples_at_once(native, native.capture(TOKENS, logits=True), 5, unembeds=True) == 3


def test_a_state_of_another_shape_fits_no_lens():
    model = sharp("base")
    trajectory = model.capture(TOKENS, logits=True)
    reader = LensReader(model, trajectory, {"h0": trajectory.h[0][..., :7], "h1": None})
    fits = {lens.state: reader.fits(lens) for lens in lens_states(["logit"], 3)}
    assert fits == {
        "h_emb": True, "h0": False, "h1": False, "h2": True, "h3": True, "h_out": True,
    }  # fmt: skip


def test_top_tokens_are_torchs_topk():
    model = sharp()
    trajectory = model.capture(TOKENS, logits=True)
    reader = LensReader(model, trajectory)
    [lens] = [lens for lens in lens_states(["coda"], 3) if lens.state == "h1"]
    probability, ids = top_tokens(reader, lens, 2, 4)
    wanted = by_hand(model, trajectory, "coda", "h1").exp()[2].topk(4)
    torch.testing.assert_close(probability.double(), wanted.values, rtol=1e-5, atol=1e-7)
    assert torch.equal(ids, wanted.indices)
    assert top_tokens(reader, lens, 0, 10**6)[0].shape == (9, 61)


def test_why_there_is_no_lens_is_said_in_one_line():
    plain = make_model("vanilla", "3")
    trajectory = plain.capture(TOKENS, logits=True)
    assert why_no_coda_lens(plain, trajectory) == "the model has no loop"
    assert why_no_logit_lens(plain, trajectory) == ""
    bare = make_model("base", "1+1R3+0")
    assert "the coda lens is the logit lens" in why_no_coda_lens(
        bare, bare.capture(TOKENS, logits=True)
    )
    assert "no logits" in why_no_logit_lens(plain, plain.capture(TOKENS))


def test_logits_that_do_not_follow_from_h_out_are_no_logit_lens(monkeypatch):
    model = make_model("base")
    trajectory = model.capture(TOKENS, logits=True)
    true = model.unembed_state
    monkeypatch.setattr(model, "unembed_state", lambda s, tokens=None: (x + 1 for x in true(s)))
    assert "other logits" in why_no_logit_lens(model, trajectory)
    own = trajectory.logits.flatten(0, 1)[None]
    monkeypatch.setattr(model, "unembed_state", lambda s, tokens=None: iter(own))
    assert "does not read h_out" in why_no_logit_lens(model, trajectory)
