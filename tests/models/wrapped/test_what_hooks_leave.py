"""What hooks leave behind: forms, other hooks, gradients, types, and nothing after an error."""

import pytest
import torch

import loopscope as ls
from tests.models.wrapped.by_hand import by_hand, change, first, hooks_on
from tests.standins import per_loop, repeated, tied, traps
from tests.standins.registry import CASES
from tests.standins.traps import Formed, Result, Wrapped

MAKE = {case.name: case.make for case in CASES}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(7))


EDIT = {
    "tensor": lambda result, new: new,
    "tuple": lambda result, new: (new, result[1]),
    "list": lambda result, new: [new, result[1]],
    "dict": lambda result, new: {**result, "hidden_states": new},
    "dataclass": lambda result, new: Result(new, result.spread),
    "named": lambda result, new: result._replace(hidden_states=new),
}


@pytest.mark.parametrize("form", list(Wrapped.FORMS))
@pytest.mark.parametrize("side", ["in", "out"])
def test_results_keep_their_form_and_their_other_parts(form, side, tokens):
    module = Formed(form)
    model = ls.wrap(module, tokens)
    results = []
    keep = module.core[1].register_forward_hook(lambda m, a, r: results.append(r))
    clean = module(tokens)
    patched = model.run_with_hooks(
        tokens,
        return_type="output",
        fwd_hooks=[(f"loop.1.core.1.hook_{side}", lambda x, hook: change(x))],
    )
    keep.remove()
    with by_hand(module, "core.1", 1, side, EDIT[form]):
        wanted = module(tokens)
    assert patched["forms"] == wanted["forms"] == clean["forms"]
    assert torch.equal(patched["logits"], wanted["logits"])
    assert {type(r) for r in results} == {type(results[0])}
    if form != "tensor" and side == "out":
        spread = [r["spread"] if form == "dict" else getattr(r, "spread", None) for r in results]
        spread = [r[1] if s is None else s for r, s in zip(results, spread, strict=True)]
        assert torch.equal(spread[4], spread[1])  # the second part of the patched call's result


@pytest.mark.parametrize(
    "make, kind",
    [(repeated.Depth, repeated.Latents), (repeated.Gated, dict), (per_loop.Timed, tuple)],
)
def test_the_model_returns_what_it_returned_before(make, kind, tokens):
    module = make()
    model = ls.wrap(module, tokens)
    path = model.map.main.iterations[1].path
    hook = (f"loop.{path}.hook_out", lambda x, hook: change(x))
    result = model.run_with_hooks(tokens, return_type="output", fwd_hooks=[hook])
    assert type(result) is kind
    if kind is dict:
        assert list(result) == ["logits", "gates"] and len(result["gates"]) == 4
    if kind is repeated.Latents:
        assert result.loss == 0 and result.latents.shape == (2, 11, 32)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_hooks_are_gone_after_an_exception_in_a_hook(name, tokens):
    module = MAKE[name]()
    model = ls.wrap(module, tokens)
    assert hooks_on(module) == 0

    def fail(x, hook):
        raise RuntimeError("in the hook")

    torch.manual_seed(0)
    clean = first(module(tokens)) if name != "depth" else module(tokens).logits
    for address in [next(reversed(model.hook_dict)), "hook_embed"]:
        with pytest.raises(RuntimeError, match="in the hook"):
            model.run_with_hooks(tokens, fwd_hooks=[(address, fail)])
        assert hooks_on(module) == 0
    torch.manual_seed(0)
    again = first(module(tokens)) if name != "depth" else module(tokens).logits
    assert torch.equal(again, clean)
    assert torch.equal(model(tokens), model(tokens))


def test_hooks_are_gone_after_the_model_fails_under_them(tokens):
    module = MAKE["gated"]()
    model = ls.wrap(module, tokens)
    with pytest.raises(RuntimeError):
        model.run_with_hooks(
            tokens, fwd_hooks=[("loop.1.model.layers.0.hook_out", lambda x, hook: x[..., :5])]
        )
    assert hooks_on(module) == 0
    assert torch.equal(model(tokens), module(tokens)["logits"])


def test_a_users_own_hooks_stay_and_see_the_patch(tokens):
    module = MAKE["gated"]()
    seen = []
    mine = module.model.layers[2].register_forward_hook(lambda m, a, r: seen.append(a[0]))
    model = ls.wrap(module, tokens)
    seen.clear()
    model.run_with_hooks(
        tokens, fwd_hooks=[("loop.1.model.layers.1.hook_out", lambda x, hook: x * 0)]
    )
    assert [bool((x == 0).all()) for x in seen] == [False, True, False, False]
    assert hooks_on(module) == 1
    mine.remove()


def test_gradients_at_every_iteration_equal_those_of_the_manual_unroll(tokens):
    module = MAKE["gated"]()
    model = ls.wrap(module, tokens)
    kept = {}

    def keep(x, hook):
        x.retain_grad()
        kept[hook.name] = x

    names = [f"loop.{t}.model.layers.1.hook_out" for t in range(4)]
    model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names]).sum().backward()
    m, grads = module.model, []
    x = m.embed_tokens(tokens)
    for _ in range(4):
        x = m.layers[1](m.layers[0](x))
        x.retain_grad()
        grads.append(x)
        x = m.norm(m.layers[2](x))
    module.lm_head(x).sum().backward()
    for name, wanted in zip(names, grads, strict=True):
        assert torch.equal(kept[name].grad, wanted.grad)


def test_backward_hooks_see_the_gradient_of_their_iteration(tokens):
    module = MAKE["gated"]()
    model = ls.wrap(module, tokens)
    seen = {}
    names = [f"loop.{t}.model.layers.0.hook_out" for t in (1, 3)]
    hooks = [(name, lambda g, hook: seen.__setitem__(hook.name, g.clone())) for name in names]
    with model.hooks(bwd_hooks=hooks):
        model(tokens).sum().backward()
    m, kept = module.model, []
    x = m.embed_tokens(tokens)
    for _ in range(4):
        x = m.layers[0](x)
        x.retain_grad()
        kept.append(x)
        x = m.norm(m.layers[2](m.layers[1](x)))
    module.lm_head(x).sum().backward()
    assert torch.equal(seen[names[0]], kept[1].grad)
    assert torch.equal(seen[names[1]], kept[3].grad)


def test_a_backward_hook_where_the_model_cuts_gradients_warns(tokens):
    model = ls.wrap(MAKE["two_clocks"](), tokens)
    with (
        pytest.warns(UserWarning, match="without gradients"),
        model.hooks(
            bwd_hooks=[("loop.H1.L0.model.L_module.layers.1.hook_out", lambda g, hook: None)]
        ),
    ):
        pass
    with model.hooks(bwd_hooks=[("loop.H1.L2.model.L_module.hook_out", lambda g, hook: None)]):
        pass  # the last of each round has gradients: no warning


@pytest.mark.parametrize("name", ["gated", "two_clocks", "aliased", "mesh_port", "token_routed"])
def test_capture_works_under_inference_mode_autocast_and_in_bf16(name, tokens):
    module = MAKE[name]()
    model = ls.wrap(module, tokens)
    with torch.inference_mode():
        assert torch.equal(ls.capture(model, tokens, logits=True).logits, first(module(tokens)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        traj = ls.capture(model, tokens, logits=True)
        with torch.no_grad():
            assert torch.equal(traj.logits, first(module(tokens)))
    half = MAKE[name]().to(torch.bfloat16)
    traj = ls.capture(ls.wrap(half, tokens), tokens, logits=True)
    assert traj.h[0].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(traj.logits, first(half(tokens)))


def test_a_model_made_under_inference_mode_can_be_wrapped(tokens):
    with torch.inference_mode():
        module = traps.Plain()
        model = ls.wrap(module, tokens)
        assert torch.equal(model(tokens), module(tokens))


def test_a_compiled_model_is_seen_through(tokens):
    module = tied.TiedStack()
    wanted = module(tokens)
    compiled = torch.compile(module, backend="eager")
    with pytest.warns(UserWarning, match="compiled"):
        model = ls.wrap(compiled, tokens)
    patched = model.run_with_hooks(tokens, fwd_hooks=[("loop.1.hook_in", lambda x, hook: x * 0)])
    assert torch.allclose(model(tokens), wanted, atol=1e-6)
    assert not torch.allclose(patched, wanted)
