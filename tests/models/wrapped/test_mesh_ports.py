"""Memory slots and router weights of MeSH ports, against their own buffers and native models."""

import warnings

import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from tests.conftest import make_model
from tests.standins.mesh_ports import block_port, llama_port, native_port

CYCLES = ["transition", "loop.0", "loop.1", "loop.2"]


def close(a, b, part=1e-5):
    return a.shape == b.shape and (a - b).abs().max() <= part * b.abs().max()


def pair(query="prelude", slots=5, **more):
    """A native model, and a wrapped port with its weights."""
    native = make_model("mesh", "1+2R3+1", slots=slots, transition_query=query, noise=0.2)
    port = native_port(native, **more)
    routers = {kind: [f"{kind}.*"] for kind in ("write", "read")}
    spec = {"routers": routers} if more.get("softmax") == "inside" else None
    example = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    return native, ls.wrap(port, example, spec=spec)


@pytest.mark.parametrize("buffer", ["stack", "list", "einsum"])
@pytest.mark.parametrize("query", ["prelude", "embedding"])
@pytest.mark.parametrize(("make", "K", "slots"), [(block_port, 2, 5), (llama_port, 4, 2)])
def test_slots_of_a_port_are_its_own_buffer_after_each_write(make, K, slots, query, buffer, tokens):
    module = make(K, slots, query=query, buffer=buffer)
    model = ls.wrap(module, tokens[:1, :5])
    traj = ls.capture(model, tokens)
    buffers = [traj.transition.memory, *traj.memory]
    assert len(buffers) == len(module.kept) == K + 1
    assert all(close(a, b) for a, b in zip(buffers, module.kept, strict=True))
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, module(tokens))
    names = ["transition.hook_memory", *(f"loop.{t}.hook_memory" for t in range(K))]
    assert all(torch.equal(cache[name], b) for name, b in zip(names, buffers, strict=True))
    short = ls.capture(model, tokens, memory=False)
    assert short.memory is None and short.transition.memory is None and short.mesh_cycle


def test_a_port_without_a_prelude_writes_its_embeddings(tokens):
    module = block_port(3, 4, prelude=0)
    traj = ls.capture(ls.wrap(module, tokens), tokens)
    assert all(close(a, b) for a, b in zip(traj.memory, module.kept[1:], strict=True))


@pytest.mark.parametrize("softmax", ["outside", "inside"])
@pytest.mark.parametrize("query", ["prelude", "embedding"])
def test_a_port_shows_what_the_native_model_shows_under_the_same_names(query, softmax, tokens):
    native, model = pair(query, softmax=softmax)
    assert str(model.map) == str(native.config.layout)
    a, b = ls.capture(native, tokens), ls.capture(model, tokens)
    for field in ("memory", "w_write", "w_read", "h", "h_m"):
        values = zip(getattr(b, field), getattr(a, field), strict=True)
        assert all(close(x, y) for x, y in values), field
    for field in ("query", "memory", "w_write", "w_read"):
        assert close(getattr(b.transition, field), getattr(a.transition, field)), field
    points = ("hook_memory", "write.hook_weights", "read.hook_weights")
    names = [f"{cycle}.{point}" for cycle in CYCLES for point in points]
    assert {*names} <= {*native.hook_dict} and {*names} <= {*model.hook_dict}
    _, wanted = native.run_with_cache(tokens, names_filter=names)
    _, cache = model.run_with_cache(tokens, names_filter=names)
    assert all(close(cache[name], wanted[name]) for name in names)


def shift(w, hook):
    """Other weights at the odd tokens."""
    new = w.clone()
    new[:, 1::2] = w[:, 1::2].roll(1, -1)
    new[:, 3] = torch.eye(w.shape[-1])[1]
    return new


@pytest.mark.parametrize("softmax", ["outside", "inside"])
@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("kind", ["write", "read"])
def test_patched_weights_do_what_they_do_in_the_native_model(kind, cycle, softmax, tokens):
    native, model = pair(softmax=softmax)
    name, after = f"{cycle}.{kind}.hook_weights", "loop.2.hook_memory"
    seen = []
    hooks = [(name, shift), (after, lambda m, hook: seen.append(m))]
    patched = model.run_with_hooks(tokens, fwd_hooks=hooks)
    wanted = native.run_with_hooks(tokens, fwd_hooks=hooks)
    assert close(patched, wanted) and not close(patched, model(tokens), 1e-3)
    assert close(*seen)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda w, hook: w * 1)]),
                       model(tokens))  # fmt: skip


def test_states_before_a_patch_of_weights_stay_bit_equal(tokens):
    _, model = pair()
    clean = ls.capture(model, tokens)
    with model.hooks([("loop.1.write.hook_weights", shift)]):
        patched = ls.capture(model, tokens)
    assert all(map(torch.equal, patched.h[:2], clean.h[:2]))
    assert torch.equal(patched.memory[0], clean.memory[0])
    assert torch.equal(patched.w_write[1], shift(clean.w_write[1], None)) or close(
        patched.w_write[1], shift(clean.w_write[1], None)
    )
    assert not close(patched.h[2], clean.h[2], 1e-3)


@pytest.mark.parametrize("point", ["loop.1.hook_out", "loop.1.hook_state", "loop.1.hook_in"])
def test_slots_under_a_patch_are_those_that_the_patched_run_has(point, tokens):
    native, model = pair()
    halve = (point, lambda x, hook: x * 0.5)
    with model.hooks([halve]), warnings.catch_warnings():
        warnings.simplefilter("error")
        traj = ls.capture(model, tokens)
        _, cache = model.run_with_cache(tokens, names_filter="loop.2.hook_memory")
    assert torch.equal(cache["loop.2.hook_memory"], traj.memory[2])
    assert close(traj.memory[2], model.module.kept[3])
    if point != "loop.1.hook_in":  # there a port's routers see what they saw
        with native.hooks([halve]):
            wanted = ls.capture(native, tokens)
        assert close(traj.memory[2], wanted.memory[2])


def test_slots_cannot_be_changed_and_have_no_gradient_of_their_own(tokens):
    _, model = pair()
    with pytest.raises(InputError, match=r"loop\.1\.hook_memory can be read, not changed"):
        model.run_with_hooks(tokens, fwd_hooks=[("loop.1.hook_memory", lambda m, hook: m * 0)])
    with pytest.raises(InputError, match="no gradient arrives there"):
        model.run_with_hooks(tokens, bwd_hooks=[("loop.1.hook_memory", lambda g, hook: None)])
    with pytest.raises(InputError, match="no gradient arrives there"):
        model.add_hook("loop.1.read.hook_weights", lambda g, hook: None, "bwd")
    _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    assert "loop.1.hook_memory" in cache and "loop.1.hook_out_grad" in cache


@pytest.mark.parametrize(
    "change", [lambda w: w * 0, lambda w: w * 2, lambda w: w - 1, lambda w: w[..., :1]]
)
def test_weights_that_the_models_softmax_cannot_give_are_refused(change, tokens):
    _, model = pair()
    with pytest.raises(InputError, match=r"sum to 1|weights are \(2, 11, 5\)"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("loop.1.read.hook_weights", lambda w, hook: change(w))]
        )


ALMOST = {
    "decay": {"decay": 0.9995},
    "temperature": {"temperature": 1.002},
}


@pytest.mark.parametrize("kind", ALMOST)
def test_what_is_almost_mesh_has_no_slots_and_says_so(kind, tokens):
    model = ls.wrap(block_port(3, 3, **ALMOST[kind]), tokens)
    traj = ls.capture(model, tokens)
    assert not traj.mesh_cycle and traj.memory is None and traj.transition.memory is None
    assert not any(name.endswith("hook_memory") for name in model.hook_dict)
    assert any("memory slots and α are withheld" in line for line in model.outline().lines())
    cache = model.run_with_cache(tokens)[1]
    assert torch.equal(cache["loop.1.write.hook_weights"], traj.w_write[1])
    with pytest.raises(InputError, match="can be read, not changed"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("loop.1.write.hook_weights", lambda w, hook: w.roll(1, -1))]
        )
    tables = ls.measure(model, tokens, measures="routing")
    assert "alpha" not in set(tables.routing["kind"])
    assert "there is no α" in " ".join(tables.provenance["models"]["Port"]["notes"])


def test_slots_are_withheld_on_an_input_on_which_the_port_is_another(tokens):
    odd = tokens.clone()
    odd[0, 0] = 60
    module = block_port(3, 3, decay=0.9, decay_at=60)
    model = ls.wrap(module, tokens)
    assert ls.capture(model, tokens).memory is not None
    with pytest.warns(UserWarning, match="do not follow from the routers"):
        traj = ls.capture(model, odd)
    assert traj.memory is None and not traj.mesh_cycle
    with pytest.warns(UserWarning) as warned:
        _, cache = model.run_with_cache(odd, names_filter=lambda name: name.startswith("loop.1."))
    assert any("no memory slots on this input" in str(w.message) for w in warned)
    assert "loop.1.hook_memory" not in cache and "loop.1.hook_out" in cache
    samples = torch.cat([tokens[:1], odd[:1]])
    with pytest.warns(UserWarning, match="do not follow from the routers"):
        routing = ls.measure(model, samples, measures="routing", batch_size=1).routing
    alpha = routing[routing["kind"].eq("alpha")]
    assert alpha.groupby("sample")["mean"].count().tolist() == [len(alpha) // 2, 0]
    assert alpha["flag"].isna().tolist() == alpha["sample"].eq(0).tolist()


def test_a_port_in_bfloat16_has_slots_and_says_how_well_they_were_checked(tokens):
    module = block_port(3, 3).bfloat16()
    model = ls.wrap(module, tokens)
    traj = ls.capture(model, tokens)
    assert traj.memory[2].dtype == torch.bfloat16
    assert close(traj.memory[2].float(), module.kept[3].float(), 0.02)
    assert any("held against the states to 0.03" in line for line in model.outline().lines())
