"""Hooks at one iteration of one submodule, against hand-written torch hooks that count calls."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import loopscope as ls
from loopscope.errors import InputError
from tests.standins import per_loop, repeated, tied, traps
from tests.standins.registry import CASES
from tests.standins.traps import Formed, Result, Wrapped, stream

MAKE = {case.name: case.make for case in CASES}

PLACES = [
    # stand-in, address without its side, module, which of the module's calls that is
    ("gated", "loop.2.model.layers.1", "model.layers.1", 2),
    ("gated", "loop.0.model.norm", "model.norm", 0),
    ("gated", "loop.3.model.layers.2.attn.qkv", "model.layers.2.attn.qkv", 3),
    ("nano_fork", "loop.1.transformer.h.0.mlp.up", "transformer.h.0.mlp.up", 1),
    ("two_clocks", "loop.H1.L0.model.L_module.layers.1", "model.L_module.layers.1", 3),
    ("two_clocks", "loop.H0.L2.model.L_module.layers.0.attn", "model.L_module.layers.0.attn", 2),
    ("two_clocks", "loop.H1.model.H_module", "model.H_module", 1),
    ("layer_major", "loop.A2.layers.0.mlp", "layers.0.mlp", 2),
    ("layer_major", "loop.B0.layers.1.norm2", "layers.1.norm2", 0),
    ("interleaved", "loop.1.shared.attn.out", "shared.attn.out", 1),
    ("interleaved", "loop.1.layers.2", "layers.2", 0),
    ("tied_stack", "loop.2.layers.6.mlp.down", "layers.6.mlp.down", 0),
    ("tied_stack", "loop.0.layers.1", "layers.1", 0),
    ("relaxed", "loop.1.layers.3.attn.qkv.a", "layers.3.attn.qkv.a", 0),
    ("aliased", "loop.1.model.layers.3.attn", "model.layers.3.attn", 1),
    ("aliased", "model.layers.4", "model.layers.4", 0),
    ("lora_per_loop", "loop.2.core.1.down.2", "core.1.down.2", 0),
    ("lora_per_loop", "loop.2.core.1.block.norm1", "core.1.block.norm1", 2),
    ("timed", "loop.3.transformer.h.blocks.1.scale", "transformer.h.blocks.1.scale", 3),
    ("timed", "loop.1.time_embedder", "time_embedder", 1),
    ("norm_per_loop", "loop.1.loop_norms.1", "loop_norms.1", 0),
    ("mesh_port", "loop.1.model.write_routers.2", "model.write_routers.2", 0),
    ("mesh_port", "loop.2.model.layers.1", "model.layers.1", 2),
    ("mesh_port", "model.read_routers.0", "model.read_routers.0", 0),
    ("mesh_port_early", "loop.0.model.read_routers.1", "model.read_routers.1", 0),
    ("token_routed", "loop.1.recursions.1.router", "recursions.1.router", 0),
    ("token_routed", "loop.2.recursions.2.block.0.attn", "recursions.2.block.0.attn", 0),
    ("partial", "loop.1.core.0", "core.0", 1),
    ("partial", "loop.0.between", "between", 0),
    ("fused", "loop.1.layers.0.block.mlp", "layers.0.block.mlp", 1),
    ("chained", "loop.1.core.2.attn", "core.2.attn", 1),
    ("chained", "prelude.1", "prelude.1", 0),
    ("encoder", "loop.2.core.1", "core.1", 2),
    ("plain", "layers.3.mlp.up", "layers.3.mlp.up", 0),
]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(7))


def change(x: torch.Tensor) -> torch.Tensor:
    return 1.5 * x + 0.25


@contextmanager
def by_hand(module: nn.Module, name: str, call: int, side: str, edit=None):
    """A torch hook that changes one call of one module; gives the tensors that it has seen."""
    seen: list[torch.Tensor] = []

    def count(x):
        seen.append(x)
        return change(x) if len(seen) - 1 == call else x

    def before(part, args, kwargs):
        if args:
            return (count(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": count(kwargs["hidden_states"])}

    def after(part, args, result):
        if edit is None:
            return count(result)
        new = count(stream(result))
        return edit(result, new)

    part = module.get_submodule(name)
    if side == "in":
        handle = part.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = part.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def first(result) -> torch.Tensor:
    if isinstance(result, dict):
        return result.get("logits", result.get("last_hidden_state"))
    return result[0] if isinstance(result, tuple) else result


def hooks_on(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("name, address, part, call", PLACES)
def test_a_patch_at_one_call_is_the_same_patch_made_by_hand(
    name, address, part, call, side, tokens
):
    module = MAKE[name]()
    model = ls.wrap(module, tokens)
    shown = []

    def patch(x, hook):
        shown.append(x.clone())
        return change(x)

    clean = first(module(tokens))
    patched = model.run_with_hooks(tokens, fwd_hooks=[(f"{address}.hook_{side}", patch)])
    with by_hand(module, part, call, side) as seen:
        wanted = first(module(tokens))
    assert len(shown) == 1 and torch.equal(shown[0], seen[call])
    assert torch.equal(first(patched), wanted)
    assert not torch.equal(wanted, clean)
    assert hooks_on(module) == 0
    assert torch.equal(first(module(tokens)), clean)


@pytest.mark.parametrize("name, address, part, call", PLACES)
def test_what_comes_before_a_patch_is_bit_equal_and_what_comes_after_is_not(
    name, address, part, call, tokens
):
    module = MAKE[name]()
    model = ls.wrap(module, tokens)
    _, clean = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[(f"{address}.hook_out", lambda x, hook: change(x))]):
        _, patched = model.run_with_cache(tokens)
    # hooks are called where tensors arise: a module's input before its output
    where = list(model.hook_dict).index(model.canonical(f"{address}.hook_out"))
    with by_hand(module, part, call, "out"):
        _, wanted = model.run_with_cache(tokens)
    changed = {n for n in clean if not torch.equal(clean[n], wanted[n])}
    for hook in model.hook_dict:
        assert torch.equal(patched[hook], wanted[hook]), hook
    enclosing = address.split("loop.")[-1]
    early = [n for n in list(model.hook_dict)[:where] if n.endswith("hook_in")]
    assert not changed & set(early) or enclosing == address
    assert changed


@pytest.mark.parametrize("name", ["gated", "nano_fork", "chained", "encoder"])
def test_every_submodule_at_every_iteration_is_reached(name, tokens):
    module = MAKE[name]()
    model = ls.wrap(module, tokens)
    (loop,) = model.map.loops
    calls: Counter[str] = Counter()
    order: list[str] = []
    handles = []
    for part, one in module.named_modules():
        note = lambda m, a, r, part=part: (calls.update([part]), order.append(part))  # noqa: E731
        handles.append(one.register_forward_hook(note))
    module(tokens)
    for handle in handles:
        handle.remove()
    inside = [p for p, n in calls.items() if n == loop.K]
    assert len(inside) >= 20
    for i, part in enumerate(inside):
        t = i % loop.K
        address = f"loop.{loop.iterations[t].path}.{part}.hook_out"
        patched = model.run_with_hooks(tokens, fwd_hooks=[(address, lambda x, hook: change(x))])
        with by_hand(module, part, t, "out"):
            assert torch.equal(first(patched), first(module(tokens))), address


def test_a_state_patched_inside_a_concatenation_changes_only_its_columns(tokens):
    module = MAKE["depth"]()
    model = ls.wrap(module, tokens)
    start = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(4))
    patched = model.run_with_hooks(
        tokens,
        input_states=start,
        fwd_hooks=[("loop.2.hook_in", lambda x, hook: change(x))],
    )
    trunk = module.trunk
    with torch.no_grad():
        e = trunk["prelude"][1](trunk["prelude"][0](trunk["wte"](tokens) * 32**0.5))
        x = start
        for t in range(4):
            x = change(x) if t == 2 else x
            x = trunk["adapter"](torch.cat([x, e], dim=-1))
            for block in trunk["core_block"]:
                x = block(x)
        for block in trunk["coda"]:
            x = block(trunk["ln_f"](x))
        assert torch.equal(patched, module.lm_head(trunk["ln_f"](x)))


def test_a_patch_through_an_alias_is_the_patch_at_its_address(tokens):
    module = MAKE["aliased"]()
    model = ls.wrap(module, tokens)
    results = [
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: change(x))])
        for name in [
            "loop.1.model.layers.3.hook_out",
            "loop.1.model.rec_block.1.hook_out",
            "loop.1.layer.1.hook_out",
            "blocks.5.hook_resid_post",
        ]
    ]
    with by_hand(module, "model.layers.3", 1, "out"):
        wanted = module(tokens)
    assert all(torch.equal(one, wanted) for one in results)


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


def test_hooks_at_two_iterations_and_both_sides_add_up(tokens):
    module = MAKE["gated"]()
    model = ls.wrap(module, tokens)
    names = [
        ("loop.0.model.layers.1.hook_in", 0, "in"),
        ("loop.2.model.layers.1.hook_in", 2, "in"),
        ("loop.2.model.layers.1.hook_out", 2, "out"),
    ]
    patched = model.run_with_hooks(
        tokens, fwd_hooks=[(name, lambda x, hook: change(x)) for name, _, _ in names]
    )
    part = "model.layers.1"
    with (
        by_hand(module, part, 0, "in"),
        by_hand(module, part, 2, "in"),
        by_hand(module, part, 2, "out"),
    ):
        assert torch.equal(patched, module(tokens)["logits"])


def test_a_filter_by_predicate_chooses_one_module_in_every_iteration(tokens):
    module = MAKE["gated"]()
    model = ls.wrap(module, tokens)
    _, cache = model.run_with_cache(
        tokens, names_filter=lambda name: name.endswith("layers.0.attn.hook_out")
    )
    with by_hand(module, "model.layers.0.attn", -1, "out") as seen:
        module(tokens)
    assert list(cache) == [f"loop.{t}.model.layers.0.attn.hook_out" for t in range(4)]
    assert all(torch.equal(cache[name], x) for name, x in zip(cache, seen, strict=True))


def test_a_name_that_does_not_exist_lists_near_ones(tokens):
    model = ls.wrap(MAKE["gated"](), tokens)
    with pytest.raises(InputError, match=r"loop\.2\.model\.layers\.1\.hook_out"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("loop.2.model.layer.1.hook_out", lambda x, hook: x)]
        )


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
    kept = []
    handle = module.model.layers[0].register_forward_hook(
        lambda m, a, r: (r.retain_grad(), kept.append(r))[2:]
    )
    handle.remove()
    handle = module.model.layers[0].register_forward_hook(
        lambda m, a, r: None if r.retain_grad() is not None else kept.append(r)
    )
    module(tokens)["logits"].sum().backward()
    handle.remove()
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
    model = ls.wrap(compiled, tokens)
    patched = model.run_with_hooks(tokens, fwd_hooks=[("loop.1.hook_in", lambda x, hook: x * 0)])
    assert torch.allclose(model(tokens), wanted, atol=1e-6)
    assert not torch.allclose(patched, wanted)
