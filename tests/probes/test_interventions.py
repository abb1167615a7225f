"""Interventions: against loops written by hand, hooks by hand, TransformerLens, and ports."""

from collections.abc import Callable

import pytest
import torch
from transformer_lens import patching

import loopscope as ls
from loopscope.errors import InputError, LoopCountError
from loopscope.models.native.block import rotary_tables
from loopscope.probes import (
    CleanRun,
    Intervention,
    clean_run,
    intervened,
    place_named,
    places,
)
from tests.conftest import VARIANTS, make_model
from tests.standins.mesh_ports import block_port, native_port
from tests.standins.registry import CASES
from tests.standins.traps import Adaptive
from tests.standins.two_states import ByTurns

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def place(clean: CleanRun, name: str):
    return place_named(clean.model, clean.trajectory, name)


def put(clean: CleanRun, name: str, how: str, value=None, *, frozen: bool = False) -> torch.Tensor:
    return intervened(clean, [Intervention(place(clean, name), how, value)], frozen=frozen)


def other(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens * 7 + 3) % 61


@torch.no_grad()
def mesh_by_hand(
    model, tokens, *, slots: Callable | None = None, weights: Callable | None = None,
    edges: Callable | None = None, routers: dict | None = None,
) -> torch.Tensor:  # fmt: skip
    """MeSH (Eqs. 2-5) as a loop of its own: slots, weights and states pass through functions."""
    mesh, layout = model.recurrence, model.config.layout
    h_emb = model.embed(tokens) * (model.config.d_model**0.5 if model.config.embed_scale else 1)
    tables = rotary_tables(model.config, tokens.shape[1], h_emb)

    def run(first, last, x):
        for v in range(first, last):
            x = model.blocks[v](x, tables)
        return x

    pre = run(0, layout.prelude, h_emb)
    memory = [h_emb, *[torch.zeros_like(h_emb) for _ in range(mesh.slots - 1)]]
    sources = {"h_emb": (h_emb, None)}
    query, value, h = (h_emb if mesh.query_embedding else pre), pre, None
    for t in range(-1, layout.K):
        if t >= 0:
            query = h
            value = run(layout.core_start(t), layout.core_start(t + 1), h)
        router = mesh.transition if t < 0 else mesh.iterations[t]
        w = {"write": router.write(query).softmax(-1), "read": router.read(query).softmax(-1)}
        for kind in w:
            w[kind] = routers[kind, t] if routers else w[kind]
            w[kind] = weights(kind, t, w[kind]) if weights else w[kind]
        memory = [m + value * w["write"][..., b : b + 1] for b, m in enumerate(memory)]
        memory = slots(t, memory) if slots else memory
        h = sum(m * w["read"][..., b : b + 1] for b, m in enumerate(memory))
        sources["prelude" if t < 0 else f"h_m{t}"] = (value, w["write"])
        for name, (source, write) in sources.items() if edges else ():
            alpha = w["read"][..., :1] if write is None else (w["read"] * write).sum(-1)[..., None]
            h = edges(name, t + 1, h, alpha * source)
    return model.unembed(model.ln_final(run(layout.core_start(layout.K), layout.n_layers, h)))


def clean_routers(clean: CleanRun) -> dict:
    trajectory = clean.trajectory
    return {
        (kind, t): getattr(trajectory.transition if t < 0 else trajectory, f"w_{kind}")
        if t < 0
        else getattr(trajectory, f"w_{kind}")[t]
        for kind in ("write", "read")
        for t in range(-1, trajectory.K)
    }


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def mesh(ids) -> CleanRun:
    return clean_run(make_model("mesh", "1+2R3+1", slots=4, noise=0.2), ids)


@pytest.fixture(scope="module")
def port(mesh, ids) -> CleanRun:
    return clean_run(ls.wrap(native_port(mesh.model), ids), ids)


def test_the_clean_pass_is_the_models(mesh, port):
    for clean in (mesh, port):
        assert torch.equal(clean.logits, clean.model(clean.tokens))
    torch.testing.assert_close(mesh_by_hand(mesh.model, mesh.tokens), mesh.logits, **CLOSE)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_edge_cut_by_hand_gives_the_same_logits(mesh, frozen):
    routers = clean_routers(mesh) if frozen else None
    edges, _ = places(mesh.model, mesh.trajectory, ["edge"])
    assert len(edges) == 2 + 3 + 4 + 5
    for edge in edges:

        def cut(source, t, h, part, edge=edge):
            return h - part if (source, f"h{t}") == (edge.source, edge.state) else h

        wanted = mesh_by_hand(mesh.model, mesh.tokens, edges=cut, routers=routers)
        got = intervened(mesh, [Intervention(edge, "zero")], frozen=frozen)
        torch.testing.assert_close(got, wanted, **CLOSE)
        assert (got - mesh.logits).abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["write", "read"])
def test_a_weight_cut_by_hand_gives_the_same_logits_without_renormalisation(mesh, kind, frozen):
    routers = clean_routers(mesh) if frozen else None
    for t in range(-1, 3):

        def cut(of_kind, at, w, t=t):
            w = w.clone()
            if (of_kind, at) == (kind, t):
                w[..., 2] = 0
            return w

        wanted = mesh_by_hand(mesh.model, mesh.tokens, weights=cut, routers=routers)
        got = put(mesh, f"{kind} m2@{t}", "zero", frozen=frozen)
        torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_slot_replaced_by_hand_gives_the_same_logits(mesh, frozen):
    routers = clean_routers(mesh) if frozen else None
    resampled = clean_run(mesh.model, other(mesh.tokens))
    for t in range(-1, 3):
        value = resampled.value(place(mesh, f"m1@{t}"))

        def replaced(at, memory, t=t, value=value):
            return [value if (b, at) == (1, t) else m for b, m in enumerate(memory)]

        wanted = mesh_by_hand(mesh.model, mesh.tokens, slots=replaced, routers=routers)
        got = put(mesh, f"m1@{t}", "resample", value, frozen=frozen)
        torch.testing.assert_close(got, wanted, **CLOSE)


SAMPLE = [
    "loop1", "loop0.attn", "loop1.layer1.mlp", "loop1.layer1.head2", "m0@-1", "m2@1", "write m1@-1",
    "write m2@1", "read m0@-1", "read m2@1", "h_emb>h0", "prelude>h1", "h_m0>h1", "h_m0>h2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "frozen"), [("zero", False), ("zero", True), ("resample", True), ("erase", False)]
)
def test_a_port_answers_as_the_native_model_with_its_weights(mesh, port, how, frozen):
    every = [[p.name for p in places(c.model, c.trajectory)[0]] for c in (mesh, port)]
    assert every[0] == every[1]
    strangers = [clean_run(clean.model, other(clean.tokens)) for clean in (mesh, port)]
    for name in SAMPLE:
        pair = []
        for clean, stranger in zip((mesh, port), strangers, strict=True):
            values = {"resample": stranger.value(place(clean, name)), "erase": lambda x: 0.5 * x}
            pair.append(put(clean, name, how, values.get(how), frozen=frozen))
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
        assert (pair[0] - mesh.logits).abs().max() > 1e-3, name


def test_frozen_and_recomputed_routers_differ_by_what_the_routers_see(mesh):
    total, direct = put(mesh, "loop0", "zero"), put(mesh, "loop0", "zero", frozen=True)
    assert not torch.allclose(total, direct, atol=1e-3)
    names = [f"loop.{t}.{kind}.hook_weights" for t in range(3) for kind in ("write", "read")]
    _, cache = mesh.model.run_with_cache(mesh.tokens, names_filter=names)
    hooks = [(name, lambda w, hook: cache[hook.name]) for name in names]
    hooks += [("loop.0.hook_out", lambda x, hook: torch.zeros_like(x))]
    assert torch.equal(direct, mesh.model.run_with_hooks(mesh.tokens, fwd_hooks=hooks))


def test_frozen_weights_of_dynamic_are_those_of_the_clean_pass(ids):
    clean = clean_run(make_model("dynamic", noise=0.2), ids)
    _, cache = clean.model.run_with_cache(ids, names_filter="loop.2.mix.hook_weights")
    hooks = [
        ("loop.1.hook_out", lambda x, hook: torch.zeros_like(x)),
        ("loop.2.mix.hook_weights", lambda w, hook: cache[hook.name]),
    ]
    wanted = clean.model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.equal(put(clean, "loop1", "zero", frozen=True), wanted)
    assert not torch.equal(put(clean, "loop1", "zero"), wanted)


@pytest.mark.parametrize("variant", ["vanilla", *VARIANTS])
def test_putting_back_what_stands_there_changes_no_bit(variant, ids):
    layout = "1+1+2+1" if variant == "vanilla" else "1+1R2+1"
    slots = {"slots": 3} if variant == "mesh" else {}
    clean = clean_run(make_model(variant, layout, noise=0.2, **slots), ids)
    every, _ = places(clean.model, clean.trajectory)
    for at in every:
        for frozen in (False, True):
            back = intervened(clean, [Intervention(at, "patch", clean.value(at))], frozen=frozen)
            assert torch.equal(back, clean.logits), at.name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_putting_back_changes_no_bit_in_other_dtypes_and_single_samples(dtype, ids):
    model = make_model("mesh", "1+1R2+1", slots=3, noise=0.2).to(dtype)
    for made in (model, ls.wrap(native_port(model), ids)):
        clean = clean_run(made, ids[:1])
        for at in (place(clean, name) for name in SAMPLE if "layer1" not in name):
            again = intervened(clean, [Intervention(at, "patch", clean.value(at))])
            assert torch.equal(again, clean.logits), at.name
            changed = intervened(clean, [Intervention(at, "zero")])
            assert changed.dtype == dtype and changed.isfinite().all()


LOOPED = [case for case in CASES if case.cores and case.name in (
    "depth", "recurring", "two_clocks", "tied_stack", "lora_per_loop", "mesh_port", "token_routed",
)]  # fmt: skip


@pytest.mark.parametrize("make", [*(case.make for case in LOOPED), ByTurns])
def test_every_mechanic_puts_back_without_a_trace_and_feels_a_zero(make, ids):
    clean = clean_run(ls.wrap(make(), ids), ids)
    every, _ = places(clean.model, clean.trajectory)
    assert {at.kind for at in every} >= {"iteration", "attention", "mlp", "edge", "head"}
    last = {at.kind: at for at in every if at.head in (None, 1)}
    for at in last.values():
        again = intervened(clean, [Intervention(at, "patch", clean.value(at))])
        assert torch.equal(again, clean.logits), at.name
        assert not torch.equal(intervened(clean, [Intervention(at, "zero")]), clean.logits)


def test_skipping_an_iteration_of_base_is_the_model_with_that_output_replaced(ids):
    clean = clean_run(make_model("base", noise=0.2), ids)
    h = clean.trajectory.h[1]
    hooks = [("loop.1.hook_out", lambda x, hook: h)]
    wanted = clean.model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.equal(put(clean, "loop1", "skip"), wanted)
    shorter = make_model("base", noise=0.2).with_loops(2)
    assert torch.equal(wanted, shorter(ids))  # the core knows no t


def test_a_skipped_iteration_takes_the_state_of_its_own_pass(ids):
    clean = clean_run(make_model("residual", noise=0.2), ids)
    both = [
        Intervention(place(clean, "loop0"), "zero"),
        Intervention(place(clean, "loop1"), "skip"),
    ]
    states = {}
    hooks = [
        ("loop.0.hook_out", lambda x, hook: torch.zeros_like(x)),
        ("loop.1.hook_in", lambda x, hook: states.__setitem__("h", x.clone())),
        ("loop.1.hook_out", lambda x, hook: states["h"]),
    ]
    wanted = clean.model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.equal(intervened(clean, both), wanted)
    assert torch.equal(intervened(clean, both[::-1]), wanted)
    assert not torch.equal(put(clean, "loop1", "skip"), wanted)


@pytest.mark.parametrize("variant", ["base", "mesh"])
def test_patches_agree_with_transformer_lens_patching(variant, ids):
    model = make_model(variant, "1+1R2+1", noise=0.2)
    clean = clean_run(model, ids)
    _, cache = model.run_with_cache(other(ids))
    source = clean_run(model, other(ids))

    def metric(logits):
        return logits[0, -1, 5] - logits[1, -2, 3]

    tools = {
        "loop{t}.layer0.attn": patching.get_act_patch_attn_out(model, ids, cache, metric),
        "loop{t}.mlp": patching.get_act_patch_mlp_out(model, ids, cache, metric),
    }
    for pattern, table in tools.items():
        for t in (0, 1):
            at = place(clean, pattern.format(t=t))
            for pos in (0, 4, 8):
                value = clean.value(at).clone()
                value[:, pos] = source.value(at)[:, pos]
                got = metric(intervened(clean, [Intervention(at, "patch", value)]))
                torch.testing.assert_close(got, table[1 + t, pos], **CLOSE)
    heads = patching.get_act_patch_attn_head_out_all_pos(model, ids, cache, metric)
    for head in range(4):
        at = place(clean, f"loop1.layer0.head{head}")
        got = metric(intervened(clean, [Intervention(at, "patch", source.value(at))]))
        torch.testing.assert_close(got, heads[2, head], **CLOSE)


def test_an_iterations_attention_is_that_of_all_its_layers(ids):
    clean = clean_run(make_model("residual", "1+2R3+1", noise=0.2), ids)
    layers = [f"blocks.{v}.hook_attn_out" for v in (3, 4)]
    hooks = [(name, lambda x, hook: torch.zeros_like(x)) for name in layers]
    wanted = clean.model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.equal(put(clean, "loop1.attn", "zero"), wanted)
    assert torch.equal(put(clean, "loop1.attn", "skip"), wanted)
    value = clean.value(place(clean, "loop1.attn"))
    assert value.shape == (2, 9, 2, 32)
    assert torch.equal(value[:, :, 1], clean.value(place(clean, "loop1.layer1.attn")))
    assert torch.equal(put(clean, "loop1.attn", "mean", 0 * value.mean((0, 1))), wanted)


def test_a_wrapped_part_is_what_its_module_gives_in_that_iteration(ids):
    module = block_port(K=3, prelude=1, core=2)
    clean = clean_run(ls.wrap(module, ids), ids)
    name = "loop.1.core.1.mlp.hook_out"
    hooks = [(name, lambda x, hook: torch.zeros_like(x))]
    wanted = clean.model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.equal(put(clean, "loop1.layer1.mlp", "zero"), wanted)

    def head(z, hook):
        z[..., 8:16] = 0
        return z

    hooks = [("loop.1.core.1.attn.out.hook_in", head)]
    wanted = clean.model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.equal(put(clean, "loop1.layer1.head1", "zero"), wanted)


def test_what_is_erased_is_a_function_of_what_stands_there(mesh):
    direction = torch.nn.functional.normalize(torch.arange(32.0) - 10, dim=0)

    def project(x):
        return x - (x @ direction)[..., None] * direction

    got = put(mesh, "loop1", "erase", project)
    hooks = [("loop.1.hook_out", lambda x, hook: project(x))]
    assert torch.equal(got, mesh.model.run_with_hooks(mesh.tokens, fwd_hooks=hooks))


@pytest.mark.parametrize("name", ["loop2", "m1@1", "write m1@1", "read m0@1", "h_m0>h2"])
def test_what_comes_before_a_place_stays_bit_equal_and_what_comes_after_does_not(mesh, port, name):
    for clean in (mesh, port):
        seen = {}
        side = "resid_pre" if clean is mesh else "in"  # after hooks of the state
        hooks = [f"loop.{t}.layer.0.hook_{side}" for t in range(3)] + [clean.model.coda_hook]

        def keep(x, hook, seen=seen):
            seen[len(seen)] = x.clone()

        keep.reads_only = True
        with clean.model.hooks(fwd_hooks=[(hook, keep) for hook in hooks]):
            put(clean, name, "zero")
        first = 3 if name == "loop2" else 2
        same = [torch.equal(seen[t], h) for t, h in enumerate(clean.trajectory.h)]
        assert same == [t < first for t in range(4)]


def unread(mesh: CleanRun) -> CleanRun:
    """The same model, whose routers never read slot 3."""
    model = make_model("mesh", "1+2R3+1", slots=4, noise=0.2)
    with torch.no_grad():
        for router in (model.recurrence.transition, *model.recurrence.iterations):
            router.read.bias[3] = -torch.inf
    return clean_run(model, mesh.tokens)


def test_resampling_a_slot_that_is_never_read_changes_no_bit(mesh):
    native = unread(mesh)
    for clean in (native, clean_run(ls.wrap(native_port(native.model), mesh.tokens), mesh.tokens)):
        assert clean.trajectory.w_write[1][..., 3].mean() > 0.01
        stranger = clean_run(clean.model, other(mesh.tokens))
        for name in ("m3@-1", "m3@1", "write m3@0", "write m3@2"):
            value = stranger.value(place(clean, name))
            assert not torch.equal(value, clean.value(place(clean, name)))
            for frozen in (False, True):
                got = put(clean, name, "resample", value, frozen=frozen)
                assert torch.equal(got, clean.logits)


def test_several_places_at_once_are_the_hooks_by_hand_together(mesh, port):
    names = ["loop0", "m1@1", "read m2@2", "loop1.layer0.mlp"]
    both = [
        intervened(clean, [Intervention(place(clean, name), "zero") for name in names])
        for clean in (mesh, port)
    ]

    def slot(memory, hook):
        memory[:, 1] = 0
        return memory

    def weight(w, hook):
        w[..., 2] = 0
        return w

    def nothing(x, hook):
        return torch.zeros_like(x)

    hooks = [
        ("loop.0.hook_out", nothing), ("loop.1.hook_memory", slot),
        ("loop.2.read.hook_weights", weight), ("blocks.3.hook_mlp_out", nothing),
    ]  # fmt: skip
    assert torch.equal(both[0], mesh.model.run_with_hooks(mesh.tokens, fwd_hooks=hooks))
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)


def test_no_intervention_gives_the_clean_logits_and_leaves_no_hooks(mesh):
    assert torch.equal(intervened(mesh, []), mesh.logits)
    put(mesh, "loop1", "zero")
    assert not mesh.model.list_hooks()
    assert torch.equal(clean_run(mesh.model, mesh.tokens).logits, mesh.logits)


def test_what_was_kept_is_not_written_into(mesh):
    before = {name: x.clone() for name, x in mesh.kept.items()}
    for name in ("m1@1", "write m2@0", "read m0@2", "loop1.layer0.head1", "h_m0>h2"):
        for frozen in (False, True):
            put(mesh, name, "zero", frozen=frozen)
    assert all(torch.equal(x, before[name]) for name, x in mesh.kept.items())


def test_tokens_that_are_not_finite_stay_so_and_spoil_no_others(ids):
    model = make_model("mesh", noise=0.2)
    with torch.no_grad():
        model.embed.weight[int(ids[0, 4])] = torch.nan
    clean = clean_run(model, ids)
    edges, _ = places(model, clean.trajectory, ["edge"])
    assert edges
    for name in ("h_m0>h2", "m0@0", "loop1"):
        got = put(clean, name, "zero")
        assert got[0].isnan().any() and got[1].isfinite().all()
        assert torch.equal(got.isnan(), clean.logits.isnan()) and torch.equal(
            put(clean, name, "patch", clean.value(place(clean, name)))[1], clean.logits[1]
        )


def test_another_value_that_nothing_reads_is_noticed(ids):
    model = make_model("mesh", "1+1R2+1", slots=3, noise=0.2)
    with torch.no_grad():  # iteration 1 writes slot 2 alone and reads the others
        model.recurrence.iterations[1].write.bias[:2] = -torch.inf
        model.recurrence.iterations[1].read.bias[2] = -torch.inf
    clean = clean_run(model, ids)
    with pytest.warns(UserWarning, match="loop1.mlp: another value was put there and the logits"):
        put(clean, "loop1.mlp", "zero")


def test_a_place_that_is_not_reached_is_an_error(ids, monkeypatch):
    model = make_model("mesh", "1+1R2+1")
    clean = clean_run(model, ids)
    monkeypatch.setattr(model, "resume", lambda tokens, kept, hooks, first: clean.logits)
    with pytest.raises(InputError, match="loop1 was not reached on this input"):
        put(clean, "loop1", "zero")


@pytest.mark.parametrize(
    ("name", "how", "value", "message"),
    [
        ("loop1", "swap", None, "unknown way to intervene 'swap'"),
        ("m1@1", "skip", None, "m1@1 cannot be skipped: iterations, attentions"),
        ("loop1", "mean", None, "how='mean' puts a given value: give value= a tensor"),
        ("loop1", "erase", torch.zeros(1), "how='erase' takes value= a function"),
        ("loop1", "zero", torch.zeros(1), "how='zero' takes no value"),
        ("loop1", "patch", torch.zeros(5), r"the value for loop1 is \(5,\); what stands there is"),
        ("loop1", "erase", lambda x: x[:1], r"gave \(1, 9, 32\) for \(2, 9, 32\)"),
        ("loop1", "erase", lambda x: None, "gave NoneType for"),
    ],
)
def test_what_cannot_be_put_is_told(mesh, name, how, value, message):
    with pytest.raises(InputError, match=message):
        put(mesh, name, how, value)


def test_two_interventions_at_one_place_are_told(mesh):
    at = place(mesh, "loop1")
    with pytest.raises(InputError, match="two interventions at loop1"):
        intervened(mesh, [Intervention(at, "zero"), Intervention(at, "skip")])


def test_an_iteration_whose_state_has_another_shape_cannot_be_skipped(ids, monkeypatch):
    clean = clean_run(make_model("base"), ids)
    clean.kept["loop.1.hook_in"] = torch.zeros(2, 4, 32)
    with pytest.raises(InputError, match=r"loop1 cannot be skipped: h\(1\) is \(2, 4, 32\)"):
        put(clean, "loop1", "skip")


def test_a_single_text_that_loops_otherwise_has_its_own_iterations(ids):
    tokens = ids.clone()
    tokens[0, 0], tokens[1, 0] = 3, 1  # two steps, three steps
    model = ls.wrap(Adaptive(), tokens[:1])
    clean = clean_run(model, tokens[1:])
    assert (clean.trajectory.K, model.K) == (3, 2)
    assert not torch.equal(put(clean, "loop2", "zero"), clean.logits)
    with pytest.raises(LoopCountError, match="loops as often as its input asks for"):
        clean_run(model, tokens[[1, 1]])


def test_hooks_of_the_user_are_part_of_the_clean_pass_and_of_every_other(mesh):
    plain = put(mesh, "loop1", "zero")
    with mesh.model.hooks(fwd_hooks=[("loop.0.hook_out", lambda x, hook: 2 * x)]):
        clean = clean_run(mesh.model, mesh.tokens)
        assert not torch.equal(clean.logits, mesh.logits)
        for name in ("loop0", "m1@1", "h_m0>h2"):
            assert torch.equal(
                put(clean, name, "patch", clean.value(place(clean, name))), clean.logits
            )
        assert not torch.allclose(put(clean, "loop1", "zero"), plain, atol=1e-3)


def test_weights_that_the_states_do_not_follow_from_cannot_be_frozen(ids):
    clean = clean_run(ls.wrap(block_port(decay=0.9), ids), ids)
    with pytest.raises(InputError, match="can be read, not changed"):
        put(clean, "loop0", "zero", frozen=True)
    assert not torch.equal(put(clean, "loop0", "zero"), clean.logits)


def test_text_is_taken_as_tokens_are():
    clean = clean_run(ls.load("mesh"), "def f(x):")
    assert clean.logits.shape[0] == 1
    again = clean_run(clean.model, clean.model.to_tokens("def f(x):"))
    assert torch.equal(put(clean, "m0@1", "zero"), put(again, "m0@1", "zero"))
