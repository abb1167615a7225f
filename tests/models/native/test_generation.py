"""generate: what a native model goes on with, against unrolls by hand and transformers' warpers."""

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from loopscope.errors import InputError
from loopscope.models.generation import Sampling, last_logits
from tests.conftest import VARIANTS, make_model


def unrolled(run, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """The likeliest next token again and again, by hand."""
    for _ in range(steps):
        with torch.no_grad():
            tokens = torch.cat([tokens, run(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


def sharp(variant="mesh", **changes):
    """A model whose likeliest token changes from position to position."""
    return make_model(variant, noise=0.3, **changes)


@pytest.mark.parametrize("variant", ["vanilla", *VARIANTS])
def test_greedy_generation_is_the_argmax_unrolled_by_hand(variant, tokens):
    model = sharp(variant, layout="4") if variant == "vanilla" else sharp(variant)
    given = model.generate(tokens, max_new_tokens=6)
    assert given.dtype == torch.int64 and given.shape == (2, 17)
    assert torch.equal(given, unrolled(model, tokens, 6))
    assert given[:, 11:].unique().numel() > 1
    assert model.generate(tokens).shape == (2, 21) and not given.is_inference()


@pytest.mark.parametrize("name", ["loop.1.hook_out", "loop.2.layer.0.hook_resid_pre", "hook_embed"])
@pytest.mark.parametrize("way", ["context", "add"])
def test_a_hook_acts_in_every_step(name, way, tokens):
    model, seen = sharp("residual"), []

    def patch(x, hook):
        seen.append(x.shape[1])
        return -3 * x.roll(1, -1)

    wanted = unrolled(lambda t: model.run_with_hooks(t, fwd_hooks=[(name, patch)]), tokens, 5)
    seen.clear()
    if way == "add":
        model.add_hook(name, patch)
        given = model.generate(tokens, max_new_tokens=5)
        model.reset_hooks()
    else:
        with model.hooks(fwd_hooks=[(name, patch)]):
            given = model.generate(tokens, max_new_tokens=5)
    assert torch.equal(given, wanted) and seen == [11, 12, 13, 14, 15]
    assert not torch.equal(given, model.generate(tokens, max_new_tokens=5))


def test_another_number_of_iterations_holds_in_generation(tokens):
    model = sharp("residual").with_loops(5)
    assert torch.equal(model.generate(tokens, 4), unrolled(model, tokens, 4))
    assert not torch.equal(model.generate(tokens, 4), sharp("residual").generate(tokens, 4))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 3}, {"top_k": 7}, {"top_k": 1}, {"top_k": 99},
     {"top_p": 0.6}, {"top_p": 1e-6}, {"top_p": 1}, {"temperature": 0.7, "top_k": 9, "top_p": 0.5}],
)  # fmt: skip
def test_probabilities_are_those_of_transformers_warpers(options):
    logits = 3 * torch.randn(5, 61, generator=torch.Generator().manual_seed(2))
    logits[0, 3] = logits[0, 5] = logits[0].max() + 1  # two are the likeliest
    wanted = logits
    for name, warp in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in options:
            value = options[name] if name == "top_k" else float(options[name])
            wanted = warp(value)(None, wanted)
    given = Sampling(do_sample=True, **options).probabilities(logits)
    torch.testing.assert_close(given, wanted.softmax(-1))
    assert torch.equal(given == 0, wanted == -torch.inf)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 5}])
def test_draws_follow_the_probabilities(options, tokens):
    model = sharp()
    with torch.no_grad():
        probabilities = model(tokens[:1])[0, -1].div(options.get("temperature", 1.0)).softmax(-1)
    allowed = probabilities >= probabilities.topk(options.get("top_k", 61)).values[-1]
    probabilities = torch.where(allowed, probabilities, 0) / probabilities[allowed].sum()
    draws = [
        model.generate(tokens[:1].repeat(100, 1), 1, do_sample=True, seed=seed, **options)[:, -1]
        for seed in range(20)
    ]
    counts = torch.cat(draws).bincount(minlength=61)
    assert counts[~allowed].sum() == 0
    often = allowed & (probabilities > 0.005)
    seen = torch.cat([counts[often], counts[~often].sum()[None]]).tolist()
    wanted = torch.cat([probabilities[often], probabilities[~often].sum()[None]]).double() * 2000
    kept = wanted > 0
    assert chisquare(torch.tensor(seen)[kept], wanted[kept] * 2000 / wanted.sum()).pvalue > 1e-4
    assert often.sum() >= 4


def test_one_seed_gives_the_same_tokens_and_leaves_global_random_numbers_alone(tokens):
    model = sharp()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.generate(tokens, 8, do_sample=True, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(model.generate(tokens, 8, do_sample=True, seed=3), first)
    assert not torch.equal(model.generate(tokens, 8, do_sample=True, seed=4), first)
    assert torch.equal(first[:, :11], tokens)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_sampling_that_leaves_one_token_is_greedy(options, tokens):
    model = sharp()
    drawn = model.generate(tokens, 6, do_sample=True, **options)
    assert torch.equal(drawn, model.generate(tokens, 6))


def test_rows_that_end_are_filled_up_and_all_ended_end_generation(tokens):
    model = sharp()
    plain = model.generate(tokens, 8)
    first, second = plain[0, 11:].tolist(), plain[1, 11:].tolist()
    end = next(token for token in first[1:5] if token not in second[: first.index(token) + 2])
    given = model.generate(tokens, 8, eos_token_id=end)
    at = first.index(end)
    assert given[0, 11:].tolist() == [*first[:at], *[end] * (given.shape[1] - 11 - at)]
    stop = second.index(end) + 1 if end in second else 8
    assert given[1, 11:].tolist() == second[:stop]
    alone = model.generate(tokens[:1], 8, eos_token_id=end)
    assert alone[0, 11:].tolist() == first[: at + 1]


def test_text_is_gone_on_with_and_read_with_to_string():
    model = make_model("base")
    words = {f"w{i}": i for i in range(61)}
    model.tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    model.tokenizer.pre_tokenizer = Whitespace()
    given = model.generate("w3 w7 w1", 4)
    assert torch.equal(given, model.generate(torch.tensor([[3, 7, 1]]), 4))
    assert model.to_string(given)[0].startswith("w3 w7 w1 w")
    model.tokenizer = None
    with pytest.raises(InputError, match="has no tokenizer"):
        model.generate("w3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be .* at least 1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0, given 0.0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be above 0"),
        ({"do_sample": True, "top_k": 0}, "top_k must be .* at least 1"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be above 0 and at most 1, given 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1, given 1.5"),
        ({"temperature": 0.7, "top_k": 3}, "temperature, top_k would change nothing"),
        ({"use_cache": True}, "no `generate` of transformers, so there is no cache"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, tokens):
    with pytest.raises(InputError, match=message):
        make_model().generate(tokens, **options)


def test_no_tokens_are_refused_and_too_many_are_said(tokens):
    model = make_model(n_ctx=14)
    with pytest.raises(InputError, match=r"tokens must be \(batch, pos\)"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64))
    assert model.generate(tokens, 3).shape == (2, 14)
    with pytest.warns(UserWarning, match=r"15 tokens .* are longer than n_ctx = 14"):
        assert model.generate(tokens, 4).shape == (2, 15)


def test_a_backward_hook_in_generation_is_said_to_see_nothing(tokens):
    model = make_model()
    with (
        model.hooks(bwd_hooks=[("loop.1.hook_out", lambda g, hook: None)]),
        pytest.warns(UserWarning, match="backward hooks never fire"),
    ):
        model.generate(tokens, 1)


def test_logits_of_other_positions_are_refused(tokens):
    logits = torch.randn(2, 11, 61)
    assert torch.equal(last_logits(logits, tokens, "m"), logits[:, -1])
    assert torch.equal(last_logits(logits[:, -1:], tokens, "m"), logits[:, -1])
    for wrong in (logits[:, :5], logits[:1], logits[0], (logits,)):
        with pytest.raises(InputError, match=r"for tokens \(2, 11\), not logits"):
            last_logits(wrong, tokens, "m")
