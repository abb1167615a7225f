"""generate of wrapped models against transformers' own, manual unrolls and hooks of torch."""

from contextlib import contextmanager

import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from tests.models.native.test_generation import unrolled
from tests.models.wrapped.by_hand import change, hooks_on
from tests.models.wrapped.real import albert, hrm_text, llama, neox, zamba2
from tests.models.wrapped.small import Small
from tests.standins import repeated
from tests.standins.generating import LastLogits, LoopedLlama, RequestedLlama, RestlessLlama

TOKENS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(7))
NEW = 6


def lively(module, seed=1):
    """The module with weights that let its next token change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return module


HUGGING_FACE = {
    "looped": LoopedLlama,
    "requested": RequestedLlama,
    "hrm_text": lambda: lively(hrm_text()),
    "zamba2": lambda: lively(zamba2()),
    "neox": lambda: lively(neox()),
    "llama": lambda: lively(llama()),
}
PLAIN = {
    "small": Small,
    "gated": repeated.Gated,
    "nano_fork": repeated.NanoFork,
    "two_clocks": repeated.TwoClocks,
}


@pytest.fixture(params=HUGGING_FACE)
def module(request):
    return HUGGING_FACE[request.param]()


@contextmanager
def at_call(module, name, number, per_pass, side="out"):
    """A hook of torch that changes one call of a module in every forward pass of the whole."""
    calls = []

    def new(x):
        calls.append(x.shape[1])
        return change(x) if (len(calls) - 1) % per_pass == number else x

    def after(part, args, result):
        if isinstance(result, tuple):
            return (new(result[0]), *result[1:])
        return new(result)

    def before(part, args):
        return (new(args[0]), *args[1:])

    part = module.get_submodule(name)
    add = part.register_forward_hook if side == "out" else part.register_forward_pre_hook
    handle = add(after if side == "out" else before)
    try:
        yield calls
    finally:
        handle.remove()


# name of the model: address, module, which of its calls, calls in a forward pass
PATCHES = {
    "looped": ("loop.1.model.layers.0.hook_out", "model.layers.0", 1, 3),
    "requested": ("loop.2.hook_in", "model.layers.0", 2, 3, "in"),
    "hrm_text": ("loop.H1.L0.model.L_module.layers.0.hook_out", "model.L_module.layers.0", 3, 6),
    "zamba2": ("loop.1.model.layers.3.shared_transformer.hook_out", None, 0, 1),
    "neox": ("gpt_neox.layers.2.hook_out", "gpt_neox.layers.2", 0, 1),
    "llama": ("model.layers.1.hook_in", "model.layers.1", 0, 1, "in"),
}


def test_greedy_generation_is_the_originals_bit_for_bit(module):
    model = ls.wrap(module, TOKENS)
    wanted = module.generate(TOKENS, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=NEW), wanted)
    uncached = model.generate(TOKENS, max_new_tokens=NEW, use_cache=False)
    assert torch.equal(uncached, wanted)
    assert torch.equal(uncached, unrolled(model, TOKENS, wanted.shape[1] - 9))
    assert wanted[:, 9:].unique().numel() > 2
    assert hooks_on(module) == 0 and "forward" not in vars(module)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("way", ["context", "add", "original"])
def test_a_hook_at_one_iteration_acts_in_every_step_as_one_made_by_hand(name, cached, way):
    module = HUGGING_FACE[name]()
    model = ls.wrap(module, TOKENS)
    address, part, number, per_pass, *side = PATCHES[name]
    part = part or model.ports[model.canonical(address)].module
    with at_call(module, part, number, per_pass, *side) as calls:
        wanted = module.generate(TOKENS, max_new_tokens=NEW, do_sample=False, use_cache=cached)
    steps = wanted.shape[1] - 9
    assert len(calls) == steps * per_pass
    assert calls[per_pass:] == [
        1 if cached else 10 + step for step in range(steps - 1) for _ in range(per_pass)
    ]
    seen = []

    def patch(x, hook):
        seen.append(x.shape[1])
        return change(x)

    if way == "context":
        with model.hooks(fwd_hooks=[(address, patch)]):
            given = model.generate(TOKENS, max_new_tokens=NEW, use_cache=cached)
    else:
        model.add_hook(address, patch)
        if way == "add":
            given = model.generate(TOKENS, max_new_tokens=NEW, use_cache=cached)
        else:
            given = module.generate(TOKENS, max_new_tokens=NEW, do_sample=False, use_cache=cached)
        assert hooks_on(module) > 0
        model.reset_hooks()
    assert torch.equal(given, wanted)
    assert seen == calls[::per_pass]
    assert not torch.equal(given, model.generate(TOKENS, max_new_tokens=NEW))
    assert hooks_on(module) == 0 and "forward" not in vars(module)


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_without_generate_goes_on_as_unrolled_by_hand(name):
    module = PLAIN[name]()
    model = ls.wrap(module, TOKENS)
    given = model.generate(TOKENS, NEW)
    assert torch.equal(given, unrolled(model, TOKENS, NEW))
    path = model.map.main.iterations[1].path
    hooks = [(f"loop.{path}.hook_out", lambda x, hook: change(x))]

    def patched(tokens):
        return model.run_with_hooks(tokens, fwd_hooks=hooks)

    wanted = unrolled(patched, TOKENS, NEW)
    with model.hooks(fwd_hooks=hooks):
        assert torch.equal(model.generate(TOKENS, NEW), wanted)
    with pytest.raises(InputError, match="there is no cache"):
        model.generate(TOKENS, NEW, use_cache=True)


@pytest.mark.parametrize("make", [LoopedLlama, RequestedLlama, lambda: Small(3), repeated.NanoFork])
@pytest.mark.parametrize("loops", [2, 5])
def test_another_number_of_iterations_holds_in_every_step(make, loops):
    module = make()
    model = ls.wrap(module, TOKENS)
    other = model.with_loops(loops)
    seen = []
    with other.hooks(fwd_hooks=[(f"loop.{loops - 1}.hook_out", lambda x, hook: seen.append(1))]):
        given = other.generate(TOKENS, NEW)
    assert len(seen) == NEW
    assert torch.equal(given, unrolled(other, TOKENS, NEW))
    assert torch.equal(model.generate(TOKENS, NEW), unrolled(model, TOKENS, NEW))


@pytest.mark.parametrize(("rounds", "cached"), [(1, True), (1, False), (3, False)])
def test_a_loop_counted_in_the_configuration_holds_in_every_step(rounds, cached):
    module = lively(hrm_text())
    other = ls.wrap(module, TOKENS).with_loops({"H": rounds})
    given = other.generate(TOKENS, NEW, use_cache=cached)
    assert torch.equal(given, unrolled(other, TOKENS, NEW))
    module.config.H_cycles = rounds
    wanted = module.generate(TOKENS, max_new_tokens=NEW, do_sample=False, use_cache=cached)
    assert torch.equal(given, wanted)


def test_a_cache_without_a_place_for_more_iterations_says_so():
    other = ls.wrap(hrm_text(), TOKENS).with_loops({"H": 3})
    with pytest.raises(InputError, match="its cache has no place .* give use_cache=False"):
        other.generate(TOKENS, NEW)


@pytest.mark.parametrize("make", [RestlessLlama, repeated.Depth])
def test_random_first_states_are_those_of_capture(make):
    model = ls.wrap(make(), TOKENS)
    assert model.map.random
    states = []
    hook = ("loop.0.hook_in", lambda x, hook: states.append(x.clone()))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with model.hooks(fwd_hooks=[hook]):
        given = model.generate(TOKENS, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(given, unrolled(model, TOKENS, 4))
    for step, state in enumerate(states):
        assert torch.equal(state, ls.capture(model, given[:, : 9 + step]).h[0])
    if make is RestlessLlama:
        with pytest.warns(UserWarning, match="draws its first states; with a cache"):
            model.generate(TOKENS, 4, use_cache=True)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7, "temperature": 2.0}]
)
def test_sampling_is_that_of_transformers_from_the_seed(options):
    module = LoopedLlama()
    model = ls.wrap(module, TOKENS)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    given = model.generate(TOKENS, 12, do_sample=True, seed=4, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(given, model.generate(TOKENS, 12, do_sample=True, seed=4, **options))
    assert not torch.equal(given, model.generate(TOKENS, 12, do_sample=True, seed=5, **options))
    torch.manual_seed(4)
    options = {"top_k": 0, "temperature": 1.0, **options}  # by itself it would keep 50 tokens
    assert torch.equal(given, module.generate(TOKENS, max_new_tokens=12, do_sample=True, **options))


@pytest.mark.parametrize("make", [LoopedLlama, Small])
def test_sampling_with_one_token_left_is_greedy(make):
    model = ls.wrap(make(), TOKENS)
    assert torch.equal(
        model.generate(TOKENS, NEW, do_sample=True, top_k=1), model.generate(TOKENS, NEW)
    )


def test_a_checkpoint_that_samples_by_default_is_greedy_unless_asked():
    module = LoopedLlama()
    wanted = module.generate(TOKENS, max_new_tokens=NEW, do_sample=False)
    module.generation_config.do_sample, module.generation_config.temperature = True, 0.6
    assert torch.equal(ls.wrap(module, TOKENS).generate(TOKENS, NEW), wanted)


@pytest.mark.parametrize("make", [LoopedLlama, Small])
def test_rows_that_end_are_filled_up(make):
    model = ls.wrap(make(), TOKENS)
    plain = model.generate(TOKENS, NEW)[:, 9:].tolist()
    end = plain[0][2]
    given = model.generate(TOKENS, NEW, eos_token_id=end)[:, 9:].tolist()
    for row, wanted in zip(given, plain, strict=True):
        stop = wanted.index(end) + 1 if end in wanted else NEW
        assert row == [*wanted[:stop], *[end] * NEW][: len(row)]


def test_token_ids_like_the_padding_are_tokens_as_any_other():
    module = LoopedLlama()
    module.generation_config.pad_token_id = int(TOKENS[0, 3])
    model = ls.wrap(module, TOKENS)
    assert torch.equal(model.generate(TOKENS, NEW), unrolled(model, TOKENS, NEW))


def test_what_a_tokenizer_of_transformers_gives_is_gone_on_with():
    module = LoopedLlama()
    model = ls.wrap(module, TOKENS)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    batch = {"input_ids": TOKENS, "attention_mask": mask}
    wanted = module.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(batch, NEW), wanted)
    assert not torch.equal(model.generate(TOKENS, NEW), wanted)
    with pytest.raises(InputError, match="needs input_ids, given ids"):
        model.generate({"ids": TOKENS})


class Masked(Small):
    """A model of one's own that takes a mask."""

    def forward(self, tokens, attention_mask=None):
        x = self.embed(tokens)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.rest(self.loop(self.pre(x)))


def test_a_mask_grows_with_the_tokens():
    module = Masked()
    model, mask = ls.wrap(module, TOKENS), torch.ones_like(TOKENS)
    mask[0, :4] = 0

    def masked(tokens):
        grown = torch.cat([mask, torch.ones_like(tokens[:, 9:])], dim=1)
        return module(tokens, grown)

    wanted = unrolled(masked, TOKENS, NEW)
    assert torch.equal(model.generate(TOKENS, NEW, attention_mask=mask), wanted)
    assert not torch.equal(model.generate(TOKENS, NEW), wanted)


def test_a_model_that_gives_the_last_logits_alone_goes_on():
    module = LastLogits()
    model = ls.wrap(module, TOKENS)
    assert torch.equal(model.generate(TOKENS, NEW), unrolled(module, TOKENS, NEW))


def test_a_model_that_predicts_no_next_token_is_refused():
    with pytest.raises(InputError, match="cannot go on with tokens: .* looks at later tokens"):
        ls.wrap(albert(4, head=True), TOKENS).generate(TOKENS)
    with pytest.raises(InputError, match="a state of width 32 for each token, not logits"):
        ls.wrap(albert(4), TOKENS).generate(TOKENS)


@pytest.mark.parametrize("make", [LoopedLlama, Small])
def test_a_hook_that_returns_other_positions_is_refused(make):
    model = ls.wrap(make(), TOKENS)
    h = ls.capture(model, TOKENS).h_m[1]
    with (
        model.hooks(fwd_hooks=[("loop.1.hook_out", lambda x, hook: h)]),
        pytest.raises(
            InputError, match=r"returned \(2, 9, 32\).*as many positions as it was given"
        ),
    ):
        model.generate(TOKENS, 2)
    assert hooks_on(model.module) == 0
    assert torch.equal(model.generate(TOKENS, 2)[:, :9], TOKENS)
