"""What probes are fitted to: names of targets, and states of chosen tokens."""

import numpy as np
import pytest
import torch

import loopscope as ls
from loopscope.probes.probe_targets import Places, collect_states, targets
from loopscope.probes.target_names import answers, check_targets
from tests.conftest import make_model


def test_every_target_is_the_trajectorys_tensor(tokens):
    traj = ls.capture(make_model("mesh", "1+1R2+1"), tokens)
    given = targets(traj, ("h", "h_m", "m", "w_write", "w_read"))
    slots = [f"m{b}@{t}" for b in range(5) for t in (-1, 0, 1)]
    assert [*given] == [
        "h_emb", "h0", "h1", "h2", "h_out", "h_m0", "h_m1", *slots, "w_write@-1", "w_write@0",
        "w_write@1", "w_read@-1", "w_read@0", "w_read@1",
    ]  # fmt: skip
    assert given["h_m1"] is traj.h_m[1] and given["w_read@-1"] is traj.transition.w_read
    assert torch.equal(given["m3@0"], traj.memory[0][:, 3])
    assert torch.equal(given["m2@-1"], traj.transition.memory[:, 2])


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("h2", ["h2"]),
        ("h_out", ["h_out"]),
        ("h_m0", ["h_m0"]),
        ("m1", ["m1@-1", "m1@0", "m1@1"]),
        ("m1@0", ["m1@0"]),
        ("w_read@1", ["w_read@1"]),
    ],
)
def test_single_targets_stand_beside_the_embedding(asked, names, tokens):
    traj = ls.capture(make_model("mesh", "1+1R2+1"), tokens)
    assert [*targets(traj, (asked,))] == ["h_emb", *names]
    assert check_targets([asked]) is None


def test_names_that_no_model_has_are_told():
    assert check_targets(["h", "x"]) == "x"
    assert [check_targets([x]) for x in ("h_", "m@", "w", "h-1", "m1@")] == [
        "h_", "m@", "w", "h-1", "m1@",
    ]  # fmt: skip
    assert answers("h", "h_emb") and answers("h", "h12") and not answers("h", "h_m1")
    assert answers("m", "m10@2") and not answers("m1", "m10@2")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_states_of_chosen_tokens_are_taken_batch_by_batch(size):
    model = make_model("base")
    tokens = torch.randint(61, (5, 7), generator=torch.Generator().manual_seed(0))
    places = Places(np.array([0, 0, 2, 4, 4, 4]), np.array([6, 1, 3, 0, 2, 5]))
    batches = ((i, ls.capture(model, tokens[i : i + size])) for i in range(0, 5, size))
    states = collect_states(batches, lambda traj: {"x": traj.h[2]}, {7: places})
    whole = ls.capture(model, tokens).h[2]
    torch.testing.assert_close(
        torch.from_numpy(states["x"]), whole[places.sample, places.pos], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, np.float32), (torch.float64, np.float64)]
)
def test_states_keep_at_least_their_precision(dtype, kept, tokens):
    model = make_model("base").to(dtype)
    places = Places(np.array([1]), np.array([2]))
    states = collect_states([(0, ls.capture(model, tokens))], lambda t: {0: t.h[1]}, {11: places})
    assert states[0].dtype == kept
    assert states[0][0].tolist() == ls.capture(model, tokens).h[1][1, 2].tolist()
