"""Real classes of transformers against torch hooks written by hand that count calls."""

from functools import cache

import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.by_hand import by_hand, first, hooks_on, watch
from tests.models.wrapped.real import albert, hrm_text, llama, neox, zamba2

GROUP = "encoder.albert_layer_groups"


TOKENS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tokens() -> torch.Tensor:
    return TOKENS


def flat(units) -> tuple[str, ...]:
    return tuple(layer for unit in units for layer in unit.layers)


def layers_of(loop) -> list[tuple[str, ...]]:
    return [flat(iteration.units) for iteration in loop.iterations]


def numbered(name, *numbers) -> tuple[str, ...]:
    return tuple(f"{name}.{i}" for i in numbers)


MODELS = {
    "albert": albert,
    "albert_groups": lambda: albert(6, 2),
    "albert_inner": lambda: albert(3, 1, 2),
    "albert_head": lambda: albert(4, head=True),
    "hrm_text": hrm_text,
    "zamba2": zamba2,
    "zamba2_two_blocks": lambda: zamba2("mhmhmhmhm", 2),
    "neox": neox,
    "llama": llama,
}


@pytest.mark.parametrize(
    "make, layout, per_iteration",
    [
        (lambda: albert(6), "0+1R6+0", [(f"{GROUP}.0.albert_layers.0",)] * 6),
        (lambda: albert(3, 1, 2), "0+2R3+0", [numbered(f"{GROUP}.0.albert_layers", 0, 1)] * 3),
    ],
)
def test_albert_with_one_group_is_one_loop_without_layers_around_it(
    make, layout, per_iteration, tokens
):
    found = ls.wrap(make(), tokens).map
    assert str(found) == layout
    assert flat(found.prelude) == flat(found.coda) == ()
    (loop,) = found.loops
    assert layers_of(loop) == per_iteration
    assert (loop.name, loop.mechanic) == ("core", "module")
    assert not found.random


def test_albert_with_two_groups_is_two_loops_one_after_the_other(tokens):
    model = ls.wrap(albert(6, 2), tokens)
    assert str(model.map) == "0+1R3+1R3+0"
    a, b = model.map.loops
    assert (a.parent, b.parent) == (None, None)
    assert layers_of(a) == [(f"{GROUP}.0.albert_layers.0",)] * 3
    assert layers_of(b) == [(f"{GROUP}.1.albert_layers.0",)] * 3
    assert len({it.path for loop in (a, b) for it in loop.iterations}) == 6


@pytest.mark.parametrize("groups, inner", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_states_of_albert_are_its_groups_inputs_and_outputs(groups, inner, tokens):
    module = albert(6, groups, inner)
    names = [f"{GROUP}.{i}" for i in range(groups)]
    with torch.no_grad():
        seen, result = watch(module, [*names, "embeddings"], tokens)
    traj = ls.capture(ls.wrap(module, tokens), tokens)
    assert torch.equal(traj.h_emb, seen["embeddings"][0][1])
    assert traj.h_emb.shape[-1] == 16 and traj.h[0].shape[-1] == 32
    for loop, name in zip(traj.loops.values(), names, strict=True):
        assert loop.K == len(seen[name]) == 6 // groups
        for t, (given, gives) in enumerate(seen[name]):
            assert torch.equal(loop.h[t], given) and torch.equal(loop.h_m[t], gives)
    assert torch.equal(list(traj.loops.values())[-1].h[-1], result.last_hidden_state)
    assert torch.equal(traj.h_out, result.last_hidden_state)


def test_a_model_without_logits_has_no_head_and_is_neither_causal_nor_not(tokens):
    found = ls.wrap(albert(), tokens).map
    assert (found.head, found.causal) == (None, None)


def test_albert_with_a_head_sees_later_tokens(tokens):
    model = ls.wrap(albert(4, head=True), tokens)
    assert model.map.causal is False
    with pytest.raises(InputError, match="later tokens"):
        model(tokens, return_type="loss")
    assert model(tokens).shape == (2, 11, 61)


def test_hrm_text_is_a_fast_loop_inside_a_slow_one(tokens):
    found = ls.wrap(hrm_text(), tokens).map
    low, high = numbered("model.L_module.layers", 0, 1), numbered("model.H_module.layers", 0, 1)
    assert str(found) == "0+(2R3+2)R2+0"
    assert [(loop.name, loop.parent, loop.K) for loop in found.loops] == [
        ("H", None, 2),
        ("L", "H", 6),
    ]
    assert layers_of(found.loop("H")) == [low * 3 + high] * 2
    assert layers_of(found.loop("L")) == [low] * 6
    assert [it.path for it in found.loop("L").iterations] == [
        f"H{h}.L{i}" for h in range(2) for i in range(3)
    ]
    assert found.causal and found.head == "lm_head"


def test_hrm_text_says_which_iterations_run_without_gradients(tokens):
    """Its default keeps the last L of the first round and the last two of the second."""
    module = hrm_text()
    flows = []
    handle = module.model.L_module.register_forward_pre_hook(
        lambda m, a: flows.append(torch.is_grad_enabled())
    )
    module(tokens, use_cache=False)
    handle.remove()
    found = ls.wrap(module, tokens).map
    assert flows == [False, False, True, False, True, True]
    assert [it.grad for it in found.loop("L").iterations] == flows
    (note,) = found.notes  # and none that the slow state is cut, which it is not
    assert "H0.L0, H0.L1, H1.L0 without gradients" in note


def test_states_of_hrm_text_are_what_its_stacks_gave_last(tokens):
    """A stack is given the sum of both states; neither state is that sum."""
    module = hrm_text(layers=1, low=2, high=3)
    parts = ["model.L_module", "model.H_module", "lm_head", "model.embed_tokens"]
    with torch.no_grad():
        seen, result = watch(module, parts, tokens, use_cache=False)
    traj = ls.capture(ls.wrap(module, tokens), tokens, logits=True)
    low, high = seen["model.L_module"], seen["model.H_module"]
    assert (traj.loop, list(traj.others)) == ("H", ["L"])
    inner = traj.others["L"]
    assert inner.K == len(low) == 6 and traj.K == len(high) == 3
    for t, (_, gives) in enumerate(low):
        assert torch.equal(inner.h[t + 1], gives) and torch.equal(inner.h_m[t], gives)
    for t, (_, gives) in enumerate(high):
        assert torch.equal(traj.h[t + 1], gives) and torch.equal(traj.h_m[t], gives)
    assert torch.equal(traj.h[0], low[0][0]) and not inner.h[0].any()  # z_L begins with zeros
    assert list(traj.named) == ["z_H", "z_L"]
    assert torch.equal(traj.named["z_L"].h[1], low[1][1])
    assert torch.equal(traj.h[-1], seen["lm_head"][0][0])
    assert torch.equal(traj.h_emb, seen["model.embed_tokens"][0][1] * 50)  # 1 / initializer_range
    assert torch.equal(traj.logits, result.logits)


def test_zamba2_repeats_one_shared_transformer_between_layers_of_their_own(tokens):
    found = ls.wrap(zamba2(), tokens).map
    assert str(found) == "1+2R3+0"
    assert flat(found.prelude) == ("model.layers.0",)
    (loop,) = found.loops
    assert layers_of(loop) == [numbered("model.layers", i, i + 1) for i in (1, 3, 5)]
    assert loop.mechanic == "parameters"
    assert any("shared_transformer" in name for name in loop.shared)
    for i, iteration in zip((1, 3, 5), loop.iterations, strict=True):
        assert f"model.layers.{i}.linear.weight" in iteration.own
        assert not any("shared_transformer.self_attn.q_proj" in name for name in iteration.own)
    assert (found.head, found.norm, found.causal) == ("lm_head", "model.final_layernorm", True)


@pytest.mark.parametrize(
    "kinds, blocks, bounds",
    [
        ("mhmhmhm", 1, [(1, 2), (3, 4), (5, 6)]),
        ("mmhmhmmhm", 1, [(2, 3), (4, 6), (7, 8)]),
        ("mhmhmhmhm", 2, [(1, 4), (5, 8)]),
    ],
)
def test_states_of_zamba2_enter_a_hybrid_layer_and_leave_before_the_next(
    kinds, blocks, bounds, tokens
):
    module = zamba2(kinds, blocks)
    names = [*numbered("model.layers", *range(len(kinds))), "model.final_layernorm"]
    with torch.no_grad():
        seen, result = watch(module, names, tokens, use_cache=False)
    traj = ls.capture(ls.wrap(module, tokens), tokens, logits=True)
    assert len(bounds) == traj.K
    for t, (first_layer, last_layer) in enumerate(bounds):
        assert torch.equal(traj.h[t], seen[f"model.layers.{first_layer}"][0][0])
        assert torch.equal(traj.h_m[t], seen[f"model.layers.{last_layer}"][0][1])
    assert torch.equal(traj.h[-1], seen["model.final_layernorm"][0][0])
    assert torch.equal(traj.h_emb, seen["model.layers.0"][0][0])
    assert torch.equal(traj.logits, result.logits)


@pytest.mark.parametrize(
    "make, prefix, norm, n",
    [(neox, "gpt_neox", "gpt_neox.final_layer_norm", 5), (llama, "model", "model.norm", 4)],
)
def test_plain_stacks_have_no_loop_until_a_layout_groups_their_layers(
    make, prefix, norm, n, tokens
):
    module = make()
    model = ls.wrap(module, tokens)
    names = numbered(f"{prefix}.layers", *range(n))
    assert (str(model.map), model.map.loops) == (str(n), ())
    assert flat(model.map.prelude) == names
    assert (model.map.head, model.map.norm, model.map.causal) == ("lm_head", norm, True)
    grouped = model.with_layout(f"1+1+{n - 3}+1")
    with torch.no_grad():
        seen, result = watch(module, [*names, norm], tokens, use_cache=False)
    traj = ls.capture(grouped, tokens, logits=True)
    given = [x for name in names for x, _ in seen[name]]
    gives = [y for name in names for _, y in seen[name]]
    assert traj.K == 2
    assert torch.equal(traj.h_emb, given[0])
    for found, wanted in zip(traj.h, (given[1], given[2], given[n - 1]), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(traj.h_m[0], gives[1]) and torch.equal(traj.h_m[1], gives[n - 2])
    assert torch.equal(traj.h_out, seen[norm][0][0])
    assert torch.equal(traj.logits, result.logits)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_model_is_changed_by_wrapping_and_capture(name, tokens):
    module = MODELS[name]()
    weights = {n: p.clone() for n, p in module.state_dict().items()}
    use_cache = getattr(module.config, "use_cache", None)
    with torch.no_grad():
        before = first(module(tokens).to_tuple())
    model = ls.wrap(module, tokens)
    traj = ls.capture(model, tokens, logits=True)
    assert hooks_on(module) == 0 and not module.training
    assert getattr(module.config, "use_cache", None) == use_cache
    assert all(torch.equal(p, weights[n]) for n, p in module.state_dict().items())
    with torch.no_grad():
        assert torch.equal(first(module(tokens).to_tuple()), before)
    if traj.logits is not None and traj.logits.shape[-1] == 61:
        assert torch.equal(traj.logits, before)


PATCHES = [
    ("albert", "loop.4.encoder.albert_layer_groups.0", f"{GROUP}.0", 4),
    ("albert_groups", "loop.B1.encoder.albert_layer_groups.1", f"{GROUP}.1", 1),
    (
        "albert_inner",
        "loop.2.encoder.albert_layer_groups.0.albert_layers.1.ffn",
        f"{GROUP}.0.albert_layers.1.ffn",
        2,
    ),
    ("hrm_text", "loop.H1.L0.model.L_module.layers.1.mlp", "model.L_module.layers.1.mlp", 3),
    ("hrm_text", "loop.H0.L2.model.L_module.layers.0", "model.L_module.layers.0", 2),
    ("hrm_text", "loop.H1.model.H_module", "model.H_module", 1),
    ("zamba2", "loop.1.model.layers.3.linear", "model.layers.3.linear", 0),
    ("zamba2", "loop.2.model.layers.5.mamba_decoder", "model.layers.5.mamba_decoder", 0),
    ("neox", "gpt_neox.layers.2.mlp", "gpt_neox.layers.2.mlp", 0),
    ("llama", "model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj", 0),
]


@cache
def opened(name):
    """A model and its wrapped form; made once, as no run changes them."""
    module = MODELS[name]()
    return module, ls.wrap(module, TOKENS)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("name, address, part, call", PATCHES)
def test_a_patch_in_a_real_model_is_the_same_patch_made_by_hand(
    name, address, part, call, side, tokens
):
    module, model = opened(name)
    hook = (f"{address}.hook_{side}", lambda x, hook: 1.5 * x + 0.25)
    with torch.no_grad():
        patched = model.run_with_hooks(tokens, return_type="output", fwd_hooks=[hook])
        clean = first(module(tokens).to_tuple())
        with by_hand(module, part, call, side):
            wanted = first(module(tokens).to_tuple())
    assert torch.equal(first(patched.to_tuple()), wanted)
    assert not torch.equal(wanted, clean)
    assert type(patched) is type(module(tokens))
    assert hooks_on(module) == 0


@pytest.mark.parametrize("name", ["albert", "hrm_text", "zamba2", "llama"])
def test_real_models_are_captured_under_inference_mode_autocast_and_in_bf16(name, tokens):
    module, model = opened(name)

    def last(traj):
        return list(traj.loops.values())[-1].h_m[-1] if traj.K else traj.h_out

    with torch.no_grad():
        plain = last(ls.capture(model, tokens))
    with torch.inference_mode():
        assert torch.equal(last(ls.capture(model, tokens)), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ls.capture(model, tokens, logits=True)
        with torch.no_grad():
            assert torch.equal(mixed.logits, first(module(tokens).to_tuple()))
    half = MODELS[name]().to(torch.bfloat16)
    traj = ls.capture(ls.wrap(half, tokens), tokens, logits=True)
    assert last(traj).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(traj.logits, first(half(tokens).to_tuple()))


def test_key_value_caches_are_off_while_hooks_run(tokens):
    module = llama()
    seen = []
    handle = module.model.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(k.get("past_key_values")), with_kwargs=True
    )
    ls.capture(ls.wrap(module, tokens), tokens)
    handle.remove()
    assert seen and all(one is None for one in seen)
    assert module.config.use_cache


def test_gradients_of_hrm_text_flow_where_it_lets_them(tokens):
    module = hrm_text()
    model = ls.wrap(module, tokens)
    kept = {}

    def keep(x, hook):
        kept[hook.name] = x
        if x.requires_grad:
            x.retain_grad()

    names = [f"loop.H{h}.L{i}.model.L_module.hook_out" for h in range(2) for i in range(3)]
    model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names]).sum().backward()
    assert [kept[name].requires_grad for name in names] == [False, False, True, False, True, True]
    assert kept[names[-1]].grad is not None
