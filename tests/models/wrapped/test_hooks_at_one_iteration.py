"""Hooks at one iteration of one submodule, against hand-written torch hooks that count calls."""

from collections import Counter
from functools import cache

import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.by_hand import by_hand, change, first, hooks_on, recorder
from tests.standins.registry import CASES

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


TOKENS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tokens() -> torch.Tensor:
    return TOKENS


@cache
def opened(name):
    """A stand-in and its wrapped form; made once, as no run changes them."""
    module = MAKE[name]()
    return module, ls.wrap(module, TOKENS)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("name, address, part, call", PLACES)
def test_a_patch_at_one_call_is_the_same_patch_made_by_hand(
    name, address, part, call, side, tokens
):
    module, model = opened(name)
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
    module, model = opened(name)
    with recorder(module) as clean:
        module(tokens)
    with recorder(module) as patched:
        model.run_with_hooks(tokens, fwd_hooks=[(f"{address}.hook_out", lambda x, hook: change(x))])
    assert [n for n, _ in clean] == [n for n, _ in patched]
    end = [i for i, (n, _) in enumerate(clean) if n == part][call]
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(clean, patched, strict=True)]
    assert all(same[: end + 1])  # the recorder's hook comes first, so it sees the call unpatched
    assert not same[-1]


@pytest.mark.parametrize("name, address, part, call", PLACES[::3])
def test_caching_under_a_patch_shows_what_the_patch_by_hand_gives(
    name, address, part, call, tokens
):
    module, model = opened(name)
    with model.hooks(fwd_hooks=[(f"{address}.hook_out", lambda x, hook: change(x))]):
        _, patched = model.run_with_cache(tokens)
    with by_hand(module, part, call, "out"):
        _, wanted = model.run_with_cache(tokens)
    assert set(patched) == set(wanted)
    assert [n for n in wanted if not torch.equal(patched[n], wanted[n])] == []


@pytest.mark.parametrize("name", ["gated", "nano_fork", "chained", "encoder"])
def test_every_submodule_at_every_iteration_is_reached(name, tokens):
    module, model = opened(name)
    (loop,) = model.map.loops
    with recorder(module) as seen:
        module(tokens)
    calls = Counter(part for part, _ in seen)
    inside = [p for p, n in calls.items() if n == loop.K]
    assert len(inside) >= 18
    for i, part in enumerate(inside):
        t = i % loop.K
        address = f"loop.{loop.iterations[t].path}.{part}.hook_out"
        patched = model.run_with_hooks(tokens, fwd_hooks=[(address, lambda x, hook: change(x))])
        with by_hand(module, part, t, "out"):
            assert torch.equal(first(patched), first(module(tokens))), address


def test_a_state_patched_inside_a_concatenation_changes_only_its_columns(tokens):
    module, model = opened("depth")
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
    module, model = opened("aliased")
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


def test_hooks_at_two_iterations_and_both_sides_add_up(tokens):
    module, model = opened("gated")
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
    module, model = opened("gated")
    _, cache = model.run_with_cache(
        tokens, names_filter=lambda name: name.endswith("layers.0.attn.hook_out")
    )
    with by_hand(module, "model.layers.0.attn", -1, "out") as seen:
        module(tokens)
    assert list(cache) == [f"loop.{t}.model.layers.0.attn.hook_out" for t in range(4)]
    assert all(torch.equal(cache[name], x) for name, x in zip(cache, seen, strict=True))


def test_a_name_that_does_not_exist_lists_near_ones(tokens):
    _, model = opened("gated")
    with pytest.raises(InputError, match=r"loop\.2\.model\.layers\.1\.hook_out"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("loop.2.model.layer.1.hook_out", lambda x, hook: x)]
        )
