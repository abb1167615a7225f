"""Targets, masks and positions beside the tokens: what goes along with each call."""

import pytest
import torch
from torch import Tensor, nn

import loopscope as ls
from loopscope.errors import InputError
from tests.standins.blocks import VOCAB
from tests.standins.targeted import Labelled, Needed, Targeted
from tests.standins.traps import Encoder

TOKENS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
SAMPLES = torch.randint(VOCAB, (6, 20), generator=torch.Generator().manual_seed(2))
NEXT = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -1)], dim=1)
ONES, PLACES = torch.ones_like(TOKENS), torch.arange(9).expand(2, 9)


def logits(module, tokens) -> Tensor:
    with torch.no_grad():
        return module.run(tokens, tokens)[0]


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (Targeted, (TOKENS, TOKENS)),
        (Targeted, (TOKENS, NEXT)),
        (Targeted, {"targets": NEXT, "idx": TOKENS}),
        (Targeted, (TOKENS, TOKENS.flip(0))),
        (Labelled, {"attention_mask": ONES, "tokens": TOKENS, "labels": TOKENS}),
        (Labelled, {"position_ids": PLACES, "labels": NEXT, "tokens": TOKENS}),
        (Needed, TOKENS),
        (Needed, None),
    ],
)
def test_targets_are_each_calls_own_tokens(make, example):
    module = make()
    model = ls.wrap(module, example)
    assert model.map.causal and str(model.map) == "0+2R3+0"
    for given in (SAMPLES, SAMPLES[:1, :5]):
        assert torch.equal(model(given), logits(module, given))
    tables = ls.measure(model, SAMPLES, measures=["loss", "update"])
    assert len(tables.loss) == len(SAMPLES)
    assert torch.equal(ls.capture(model, SAMPLES, logits=True).logits, logits(module, SAMPLES))


def test_targets_that_the_example_has_as_the_next_tokens_are_the_next_tokens():
    module, seen = Targeted(), []
    module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[1] if len(args) > 1 else kwargs["targets"]),
        with_kwargs=True,
    )
    model = ls.wrap(module, (TOKENS, NEXT))
    model(SAMPLES)
    assert torch.equal(seen[-1][:, :-1], SAMPLES[:, 1:])
    assert int(seen[-1].min()) >= 0 and int(seen[-1].max()) < VOCAB


def test_targets_that_are_given_win_over_the_calls_own():
    module = Targeted()
    model = ls.wrap(module, (TOKENS, TOKENS))
    assert model(SAMPLES, targets=None).shape == (6, 1, VOCAB)
    output = model(SAMPLES, targets=SAMPLES.flip(1), return_type="output")
    assert torch.equal(output[1], module(SAMPLES, SAMPLES.flip(1))[1])


@pytest.mark.parametrize("last", ["kept", "dropped"])
def test_a_model_that_gives_all_logits_with_targets_alone_is_given_them_and_says_so(last):
    module, runs = Targeted(last), []
    module.register_forward_pre_hook(lambda *a: runs.append(1))
    model = ls.wrap(module, TOKENS)
    assert model.map.causal and len(runs) == 3
    assert any("tokens along as targets" in note for note in model.map.notes)
    assert torch.equal(model(SAMPLES), logits(module, SAMPLES))


def test_a_model_that_gives_none_with_targets_either_says_why():
    model = ls.wrap(Targeted(given="loss"), TOKENS)
    assert "with tokens as targets none either" in model.why_no_loss()
    model = ls.wrap(Targeted(), {"idx": TOKENS, "targets": None})
    assert 'example={"idx": tokens, "targets": tokens}' in model.why_no_loss()
    assert "of 9 tokens it returns them at 1 positions" in model.why_no_loss()
    with pytest.raises(InputError, match="9 tokens"):
        model(TOKENS, return_type="loss")


def test_logits_that_depend_on_the_targets_are_no_predictions():
    class Cheats(Targeted):
        def forward(self, idx, targets):
            scores, loss = self.run(idx, targets)
            return scores + nn.functional.one_hot(targets, VOCAB), loss

    assert ls.wrap(Cheats(), (TOKENS, TOKENS)).map.causal is False


def test_masks_and_positions_are_not_taken_for_tokens_even_where_they_are_equal():
    counting = torch.arange(9).expand(2, 9).clone()  # as position ids are
    model = ls.wrap(Labelled(), {"tokens": counting, "position_ids": PLACES, "labels": counting})
    assert set(model.inputs.copies) == {"labels"}
    assert torch.equal(model(SAMPLES), logits(model.module, SAMPLES))
    assert ls.wrap(Labelled(), (TOKENS, ONES, PLACES)).inputs.tokens == ("args", 0)


def test_reasons_for_no_loss_are_those_of_the_case():
    def reason(module, example):
        return ls.wrap(module, example).why_no_loss()

    assert "it cannot be seen whether" in reason(Targeted(), (TOKENS[:, :1], TOKENS[:, :1]))
    assert "no unembedding was seen" in reason(Encoder(), TOKENS)

    class Pooled(Encoder):
        def forward(self, tokens):
            return super().forward(tokens)["pooled"]

    assert "the shapes of what it returns are (2, 32)" in reason(Pooled(), TOKENS)
