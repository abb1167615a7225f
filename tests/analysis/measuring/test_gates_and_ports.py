"""Routing of ports and gates, and models without next tokens, from hand-made trajectories."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from loopscope.analysis.comparisons.work import Comparison
from loopscope.analysis.measures.router_weights import gate_statistics
from loopscope.analysis.measuring.streaming import measure
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import COMPARED
from loopscope.text.windows import Samples
from tests.analysis.loop_trajectories import (
    POS,
    SAMPLES,
    SLOTS,
    VOCABULARY,
    Played,
    Wrapped,
    loop,
    nested,
    random,
    tokens,
    transition,
    weights,
)


@pytest.fixture
def run():
    """Measure what a played model was made of."""

    def measured(model: Played, measures: Any = "routing", **options: Any) -> Tables:
        return measure(model, tokens(), measures, **options)

    return measured


def notes(tables: Tables) -> list[str]:
    return tables.provenance["models"]["played"]["notes"]


def gate(K: int, *, seed: int) -> tuple[torch.Tensor, ...]:
    return tuple(random(SAMPLES, POS, seed=seed + t).sigmoid() for t in range(K))


def test_entropy_of_a_gate_is_that_of_a_coin():
    p = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 1.0], [0.5, 1.0, 0.25]])
    mean, entropy = gate_statistics(p)
    quarter = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    np.testing.assert_allclose(mean.value, [0.5, 2 / 3, 1.75 / 3])
    np.testing.assert_allclose(entropy.value, [math.log(2), 0, (math.log(2) + quarter) / 3])


def test_a_gate_has_a_row_for_each_iteration_at_which_it_is_evaluated(run):
    p = gate(2, seed=1)
    one = loop("core", 3, 8, seed=1, gates={"exit": (*p, None)})
    tables = run(Played(one), drop_first=2, batch_size=2)
    routing = tables.routing
    assert routing["kind"].unique().tolist() == ["gate"]
    assert len(routing) == 2 * SAMPLES
    for t, values in enumerate(p):
        x = values[:, 2:].double().numpy()
        rows = routing[routing["t"].eq(t)]
        assert set(rows["target"]) == {"exit"}
        np.testing.assert_allclose(rows["mean"], x.mean(1), rtol=1e-6)
        entropy = -(x * np.log(x) + (1 - x) * np.log(1 - x)).mean(1)
        np.testing.assert_allclose(rows["entropy"], entropy, rtol=1e-5)
    assert notes(tables) == []
    seen = tables.tokens[tables.tokens["t"].eq(1)]
    np.testing.assert_allclose(seen["value"], p[1][0], rtol=1e-6)
    assert seen["pos"].tolist() == list(range(POS))
    assert seen["token"].tolist() == [str(i) for i in tokens()[0].tolist()]


def test_a_gate_that_a_later_batch_does_not_evaluate_is_flagged(run):
    class Leaving(Played):
        def capture(self, batch, **options):
            found = super().capture(batch, **options)
            return found if self.done <= 2 else replace(found, gates={"exit": (None,)})

    one = loop("core", 1, 8, seed=1, gates={"exit": gate(1, seed=1)})
    routing = run(Leaving(one), batch_size=2).routing
    assert routing["flag"].isna().tolist() == [True, True, False, False, False]
    assert routing["mean"].notna().tolist() == [True, True, False, False, False]


def test_gates_follow_the_routers(run):
    one = loop(
        "core", 2, 8, seed=1,
        w_write=weights(2, seed=10), w_read=weights(2, seed=20), transition=transition(),
        gates={"exit": gate(2, seed=1), "route": (None, gate(1, seed=9)[0])},
    )  # fmt: skip
    tables = run(Played(one))
    rows = tables.routing[tables.routing["sample"].eq(3)]
    assert rows["kind"].unique().tolist() == ["write", "read", "alpha", "gate"]
    assert len(rows) == 2 * 3 * SLOTS + (2 + 3 + 4) + 3
    gates = rows[rows["kind"].eq("gate")]
    assert list(zip(gates["target"], gates["t"], strict=True)) == [
        ("exit", 0), ("exit", 1), ("route", 1),
    ]  # fmt: skip
    assert len(tables.tokens) == POS * (2 * 3 * SLOTS + 3)


def test_routers_without_a_transition_begin_with_the_first_iteration(run):
    write, read = weights(3, seed=10), weights(3, seed=20)
    one = loop("core", 3, 8, seed=1, w_write=write, w_read=read, mesh_cycle=False)
    tables = run(Played(one))
    assert tables.routing["kind"].unique().tolist() == ["write", "read"]
    assert sorted(tables.routing["t"].unique()) == [0, 1, 2]
    here = tables.routing["kind"].eq("read") & tables.routing["t"].eq(2)
    rows = tables.routing[here & tables.routing["sample"].eq(4)]
    np.testing.assert_allclose(rows["mean"], read[2][4].mean(0), rtol=1e-6)
    w = read[2][4].double()
    np.testing.assert_allclose(rows["entropy"], -(w * w.log()).sum(-1).mean(), rtol=1e-6)
    assert sorted(tables.tokens["t"].unique()) == [0, 1, 2]


def test_alpha_is_left_out_where_the_cycle_is_not_meshs(run):
    one = loop(
        "core", 2, 8, seed=1, mesh_cycle=False, transition=transition(),
        w_write=weights(2, seed=10), w_read=weights(2, seed=20),
    )  # fmt: skip
    found = run(Played(one)).routing
    assert found["kind"].unique().tolist() == ["write", "read"]
    assert sorted(found["t"].unique()) == [-1, 0, 1]


def test_alpha_without_a_transition_rebuilds_the_states_of_a_buffer(run):
    K = 3
    # the same weights for all tokens: the mean over tokens is then each token's alpha
    write = tuple(w[:, :1].expand(-1, POS, -1) for w in weights(K, seed=10))
    read = tuple(w[:, :1].expand(-1, POS, -1) for w in weights(K, seed=20))
    one = loop("core", K, 8, seed=1, w_write=write, w_read=read)
    routing = run(Played(one)).routing
    sources = {"h_emb": one.h_emb, **{f"core{t + 1}": x for t, x in enumerate(one.h_m)}}
    buffer = torch.zeros(SAMPLES, SLOTS, POS, 8, dtype=torch.float64)
    buffer[:, 0] = one.h_emb
    for t in range(K):
        buffer += one.h_m[t][:, None] * write[t].mT[..., None]
        state = (buffer * read[t].mT[..., None]).sum(1)
        here = routing["kind"].eq("alpha") & routing["t"].eq(t) & routing["sample"].eq(1)
        rows = routing[here]
        assert rows["target"].tolist() == ["h_emb", *(f"core{i + 1}" for i in range(t + 1))]
        pairs = zip(rows["target"], rows["mean"], strict=True)
        rebuilt = sum(mean * sources[source][1].double() for source, mean in pairs)
        torch.testing.assert_close(rebuilt, state[1], rtol=1e-5, atol=1e-6)


def test_the_loops_that_have_gates_have_the_rows(run):
    both = nested()
    inner = replace(both.others["L"], gates={"halt": gate(6, seed=3)})
    tables = run(Played(replace(both, others={"L": inner})))
    assert set(tables.routing["loop"]) == set(tables.tokens["loop"]) == {"L"}
    assert len(tables.routing) == 6 * SAMPLES
    assert notes(tables) == []


def test_a_wrapped_model_without_routers_says_what_was_looked_for(run):
    tables = run(Wrapped(nested()))
    assert len(tables.routing) == len(tables.tokens) == 0
    assert notes(tables) == [
        "routing: no routers and no gates were found in the model or named in its spec, so its "
        "table has no rows"
    ]


def test_the_map_of_a_wrapped_model_is_in_the_provenance(run):
    told = run(Wrapped(nested()), "rank").provenance["models"]["played"]
    assert told["map"] == {"loops": [{"name": "H"}]}
    assert told["config"] == {"K": 2}
    assert "map" not in run(Played(nested()), "rank").provenance["models"]["played"]


@pytest.mark.parametrize(
    ("causal", "reason"),
    [
        (False, "looks at later tokens, so it predicts no next token"),
        (None, "returns no logits for each token"),
    ],
)
def test_a_model_that_predicts_no_next_token_has_no_loss_and_says_why(run, causal, reason):
    model = Wrapped(nested(), causal=causal)
    tables = run(model, COMPARED)
    assert len(tables.loss) == 0
    assert list(tables.loss.columns)[-1] == "value"
    assert len(tables.update) > 0
    assert notes(tables)[1] == f"loss: the model {reason}; the table has no rows"
    assert [options["logits"] for options in model.asked] == [False]


def test_a_comparison_notes_that_a_model_has_no_loss(run):
    tables = run(Wrapped(nested(), causal=False), ["rank", "loss"])
    samples = {"played": Samples(tokens=tokens(), source="", sha256="")}
    [note] = Comparison(tables=tables, samples=samples).notes
    assert note.startswith("played: loss: the model looks at later tokens")


@pytest.mark.parametrize("d_vocab", [VOCABULARY, None])
def test_numbers_that_are_fewer_than_the_vocabulary_are_no_logits(run, d_vocab):
    one = loop("core", 2, 8, seed=1, logits=random(SAMPLES, POS, 7, seed=1))
    tables = run(Played(one, d_vocab=d_vocab), "loss")
    assert len(tables.loss) == 0
    assert (
        "returns 7 numbers for each token, fewer than the 9 of its vocabulary" in notes(tables)[0]
    )


def test_one_row_of_numbers_for_a_whole_text_is_no_logits(run):
    class Classifier(Played):
        def capture(self, batch, **options):
            found = super().capture(batch, **options)
            object.__setattr__(found, "logits", found.logits[:, 0] if options["logits"] else None)
            return found

    tables = run(Classifier(loop("core", 2, 8, seed=1)), "loss", batch_size=2)
    assert len(tables.loss) == 0
    assert "returns no logits for each token" in notes(tables)[0]


def test_logits_that_do_not_exist_give_no_loss(run):
    tables = run(Played(loop("core", 2, 8, seed=1, logits=None)), "loss")
    assert len(tables.loss) == 0
    assert "returns no logits for each token" in notes(tables)[0]
