"""Counted tokens: lens and intervene on the predictions of some tokens alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import loopscope as ls
from loopscope.analysis.measures.counted_tokens import counted_tokens
from loopscope.analysis.measuring.token_windows import read_windows
from loopscope.errors import InputError, UnknownNameError
from loopscope.models.native.checkpoint import read_tokenizer
from loopscope.models.opening.targets import zoo_folder
from tests.conftest import make_model


@pytest.fixture(scope="module")
def model():
    return make_model("base", "1+1R2+1").double()


@pytest.fixture(scope="module")
def windows():
    tokens = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(5))
    where = np.zeros((3, 12), dtype=bool)
    where[0, [0, 3, 4]] = True  # the first token of a window is never predicted
    where[1, [11]] = True
    return tokens, where


def by_hand(logits, tokens, places):
    log_p = logits.detach().log_softmax(-1)
    return float(np.mean([F.nll_loss(log_p[p - 1][None], tokens[p : p + 1]) for p in places]))


def test_a_lens_averages_over_the_counted_predictions_alone(model, windows):
    tokens, where = windows
    frame = ls.lens(model, tokens, kinds=["coda"], where=where).lens
    final = frame[frame["state"].eq("h2")].set_index("sample")
    logits = model(tokens)
    for sample, places in ((0, [3, 4]), (1, [11])):
        expected = by_hand(logits[sample], tokens[sample], places)
        assert final.loc[sample, "loss"] == pytest.approx(expected, abs=1e-12)
        rank = np.mean(
            [1 + int((logits[sample, p - 1] > logits[sample, p - 1, tokens[sample, p]]).sum())
             for p in places]
        )  # fmt: skip
        assert final.loc[sample, "rank_true"] == rank
        assert final.loc[sample, "kl_final"] == 0
    assert final.loc[2, "flag"] == "zero" and np.isnan(final.loc[2, "loss"])


def test_an_effect_is_that_on_the_counted_predictions(model, windows):
    tokens, where = windows
    frame = ls.intervene(model, tokens, "loop1", "zero", where=where).effect
    assert sorted(frame["sample"]) == [0, 1]  # nothing counts in window 2
    hook = [("loop.1.hook_out", lambda h, hook: torch.zeros_like(h))]
    with torch.no_grad():
        clean, changed = model(tokens), model.run_with_hooks(tokens, fwd_hooks=hook)
    for sample, places in ((0, [3, 4]), (1, [11])):
        losses = [by_hand(x[sample], tokens[sample], places) for x in (changed, clean)]
        row = frame[frame["sample"].eq(sample)].iloc[0]
        assert row["loss"] == pytest.approx(losses[0] - losses[1], abs=1e-12)
        p, q = (x[sample, [p - 1 for p in places]].log_softmax(-1) for x in (clean, changed))
        kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
        assert row["kl"] == pytest.approx(float(kl), abs=1e-12)


def test_a_class_is_told_from_the_text():
    tokenizer = read_tokenizer(zoo_folder() / "base" / "tokenizer.json")
    named = make_model("base", "1+1R2+1", d_vocab=tokenizer.get_vocab_size())
    named.tokenizer = tokenizer
    text = "def run(x):\n    return 12\n"
    tokens = named.to_tokens(text)
    counted = counted_tokens(named, read_windows(tokens, d_vocab=None), "keyword")
    words = [tokenizer.decode([i]) for i, keep in zip(tokens[0].tolist(), counted[0], strict=True)
             if keep]  # fmt: skip
    assert "".join(words).split() == ["def", "return"]


def test_what_cannot_be_counted_says_so(model, windows):
    tokens, where = windows
    with pytest.raises(UnknownNameError, match="unknown class of tokens 'identifer'; did you mean"):
        ls.lens(model, tokens, where="identifer")
    with pytest.raises(InputError, match="has no tokenizer, so which of its tokens are 'keyword'"):
        ls.intervene(model, tokens, where="keyword")
    with pytest.raises(InputError, match=r"where has bool of shape \(2, 12\); give booleans of"):
        ls.lens(model, tokens, where=where[:2])
