"""Every iteration by name: caches, patches, gradients, early stops, wrong names."""

import copy

import pytest
import torch

from loopscope.errors import InputError, UnknownNameError
from loopscope.probes.state_capture import capture
from tests.conftest import VARIANTS, make_model

CONTRACT_NAMES = {
    "hook_embed": (2, 11, 32),
    "coda.hook_in": (2, 11, 32),
    "hook_h_out": (2, 11, 32),
    "transition.hook_in": (2, 11, 32),
    "transition.hook_memory": (2, 6, 11, 32),
    "transition.write.hook_weights": (2, 11, 6),
    "transition.read.hook_weights": (2, 11, 6),
    "loop.2.hook_in": (2, 11, 32),
    "loop.2.hook_out": (2, 11, 32),
    "loop.2.hook_memory": (2, 6, 11, 32),
    "loop.2.write.hook_weights": (2, 11, 6),
    "loop.2.read.hook_weights": (2, 11, 6),
    "blocks.7.hook_resid_post": (2, 11, 32),
    "blocks.4.attn.hook_q": (2, 11, 4, 8),
    "blocks.4.attn.hook_pattern": (2, 4, 11, 11),
    "blocks.4.mlp.hook_post": (2, 11, 128),
}


def test_the_contracts_hook_names_exist_with_their_shapes(tokens):
    _, cache = make_model("mesh").run_with_cache(tokens)
    assert {n: tuple(cache[n].shape) for n in CONTRACT_NAMES} == CONTRACT_NAMES


def test_aliases_of_an_iteration_are_the_virtual_layers(tokens):
    model = make_model("mesh")
    _, cache = model.run_with_cache(tokens, names_filter=["loop.1.layer.0.hook_mlp_out"])
    assert list(cache.keys()) == ["blocks.3.hook_mlp_out"]
    assert cache["loop.1.layer.0.hook_mlp_out"] is cache["blocks.3.hook_mlp_out"]
    assert "loop.1.layer.0.hook_mlp_out" in cache
    assert model.mod_dict["loop.2.layer.1.attn.hook_z"] is model.hook_dict["blocks.6.attn.hook_z"]


def test_a_predicate_is_asked_about_canonical_names_and_touches_each_point_once(tokens):
    model = make_model("mesh")
    seen = []
    model.run_with_hooks(
        tokens,
        fwd_hooks=[(lambda n: n.endswith("hook_mlp_out"), lambda x, hook: seen.append(hook.name))],
    )
    assert sorted(seen) == [f"blocks.{v}.hook_mlp_out" for v in range(8)]
    seen.clear()

    def outside(name):
        return not name.startswith("blocks.")

    model.run_with_hooks(tokens, fwd_hooks=[(outside, lambda x, hook: seen.append(hook.name))])
    assert seen and not any(name.startswith("blocks.") for name in seen)


@pytest.mark.parametrize("variant", [*VARIANTS, "vanilla"])
def test_capture_leaves_logits_unchanged(variant, tokens):
    model = make_model(variant, "1+2+2+1" if variant == "vanilla" else "1+2R3+1")
    with torch.no_grad():
        plain = model(tokens)
    assert torch.equal(capture(model, tokens, logits=True).logits, plain)
    everything, _ = model.run_with_cache(tokens)
    torch.testing.assert_close(everything, plain, rtol=1e-5, atol=1e-5)


def test_a_captured_state_is_the_value_that_the_next_part_reads(tokens):
    model = make_model("mesh")
    _, cache = model.run_with_cache(tokens)
    for t, start in enumerate((1, 3, 5)):
        assert torch.equal(cache[f"loop.{t}.hook_in"], cache[f"blocks.{start}.hook_resid_pre"])
        last = f"blocks.{start + 1}.hook_resid_post"
        assert torch.equal(cache[f"loop.{t}.hook_out"], cache[last])
    assert torch.equal(cache["coda.hook_in"], cache["blocks.7.hook_resid_pre"])
    assert torch.equal(cache["hook_h_out"], cache["blocks.7.hook_resid_post"])


ORDER = ["hook_embed", "loop.0.hook_in", "loop.0.hook_out", "loop.1.hook_in", "loop.1.hook_out"]


@pytest.mark.parametrize("variant", ["base", "residual+anchor", "mesh"])
@pytest.mark.parametrize("point", ["hook_in", "hook_out", "layer.1.attn.hook_pattern"])
def test_patching_one_iteration_changes_nothing_before_it(variant, point, tokens):
    model = make_model(variant)
    names = [*ORDER, "loop.2.hook_in", "loop.2.hook_out", "hook_h_out"]
    patched = f"loop.1.{point}"

    def run(patch):
        kept = {}

        def keep(x, hook):
            kept[hook.name] = x.detach().clone()

        hooks = [(patched, patch), *((n, keep) for n in names)]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return kept

    clean = run(lambda x, hook: None)
    changed = run(lambda x, hook: x.roll(1, dims=0))
    before = ORDER[: 3 if point == "hook_in" else 4]
    assert all(torch.equal(clean[n], changed[n]) for n in before)
    assert not torch.equal(clean["loop.2.hook_in"], changed["loop.2.hook_in"])
    assert not torch.equal(clean["hook_h_out"], changed["hook_h_out"])


def test_a_patched_state_is_the_state_from_there_on(tokens):
    """Patching h(1) of one text with that of another gives the other's logits under `base`."""
    model = make_model("base")
    other = tokens.flip(1)
    donor = capture(model, other).h[1]
    with torch.no_grad():
        patched = model.run_with_hooks(
            tokens, fwd_hooks=[("loop.1.hook_in", lambda x, hook: donor)]
        )
        torch.testing.assert_close(patched, model(other), rtol=1e-5, atol=1e-5)


def test_a_hook_that_writes_in_place_changes_its_own_point_only(tokens):
    """h(1), the first layer's input and h_m(0) are one tensor in `base`; a write must not leak."""
    model = make_model("residual")

    def write(x, hook):
        x[:, 3] = 0.0
        return x

    def copy_of(x, hook):
        x = x.clone()
        x[:, 3] = 0.0
        return x

    for name in ("loop.1.layer.0.hook_resid_pre", "loop.1.hook_in", "hook_embed"):
        results = []
        for patch in (write, copy_of):
            with model.hooks(fwd_hooks=[(name, patch)]), torch.no_grad():
                logits, cache = model.run_with_cache(tokens)
            results.append((logits, cache["loop.0.hook_out"], cache["loop.1.hook_out"]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_knocked_out_slot_is_not_read(tokens):
    model = make_model("mesh")
    with torch.no_grad():
        _, before = model.run_with_cache(tokens)

        def empty(memory, hook):
            return memory.index_fill(1, torch.tensor([0]), 0.0)

        hooks = [("loop.2.hook_memory", empty)]
        names = ["coda.hook_in"]
        kept = {}
        hooks.append((names[0], lambda x, hook: kept.update(h=x)))
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    lost = before["loop.2.hook_memory"][:, 0] * before["loop.2.read.hook_weights"][..., :1]
    torch.testing.assert_close(kept["h"], before["coda.hook_in"] - lost, rtol=1e-5, atol=1e-5)


def test_gradients_reach_single_iterations(tokens):
    """dL/dh_emb of base from hooks equals finite differences in float64."""
    model = make_model("mesh").double()
    grads = {}

    def keep(grad, hook):
        grads[hook.name] = grad[0] if isinstance(grad, tuple) else grad

    with model.hooks(bwd_hooks=[("loop.1.hook_in", keep)]):
        model(tokens, return_type="loss").backward()
    direction = torch.randn(2, 11, 32, dtype=torch.float64)

    def loss(step):
        with torch.no_grad():
            return model.run_with_hooks(
                tokens,
                return_type="loss",
                fwd_hooks=[("loop.1.hook_in", lambda x, hook: x + step * direction)],
            )

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close((grads["loop.1.hook_in"] * direction).sum(), numeric)


def test_hooks_are_removed_after_an_exception(tokens):
    model = make_model("mesh")

    def fail(x, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_hooks(tokens, fwd_hooks=[("loop.1.hook_in", fail)])
    with pytest.raises(UnknownNameError):
        model.run_with_hooks(tokens, fwd_hooks=[("loop.0.hook_in", fail), ("nonsense", fail)])
    assert not model.list_hooks()


@pytest.mark.parametrize("layer", [0, 1, 3, 4, 7, 8, -1, -8])
@pytest.mark.parametrize("variant", ["base", "mesh"])
def test_stop_at_layer_gives_the_stream_entering_that_layer(variant, layer, tokens):
    model = make_model(variant)
    with torch.no_grad():
        stopped = model(tokens, stop_at_layer=layer)
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: "resid" in n or "h_out" in n)
    v = layer % 8 if layer < 0 else layer
    expected = cache["hook_h_out"] if v == 8 else cache[f"blocks.{v}.hook_resid_pre"]
    torch.testing.assert_close(stopped, expected)


@pytest.mark.parametrize("layer", [9, -9])
def test_stopping_at_a_layer_that_does_not_exist_is_refused(layer, tokens):
    with pytest.raises(InputError, match="does not exist: the unrolled model has 8"):
        make_model("mesh")(tokens, stop_at_layer=layer)


@pytest.mark.parametrize(
    "given",
    ["loop.1.hook_inn", ["hook_embed", "loop.1.hook_inn"]],
)
def test_unknown_names_raise_with_near_matches(given, tokens):
    model = make_model("mesh")
    with pytest.raises(KeyError, match=r"did you mean loop\.1\.hook_in"):
        model.run_with_cache(tokens, names_filter=given)
    with pytest.raises(KeyError, match=r"did you mean loop\.1\.hook_in"):
        model.add_hook("loop.1.hook_inn", lambda x, hook: x)


def test_a_filter_that_selects_nothing_is_refused(tokens):
    with pytest.raises(InputError, match="selects no hook"):
        make_model("mesh").run_with_cache(tokens, names_filter=lambda n: False)


def test_the_cache_says_what_was_left_out_and_what_does_not_exist(tokens):
    _, cache = make_model("mesh").run_with_cache(tokens, names_filter="loop.0.hook_in")
    with pytest.raises(KeyError, match="the run did not keep it"):
        cache["loop.1.hook_in"]
    with pytest.raises(KeyError, match=r"did you mean loop\.0\.hook_in"):
        cache["loop.0.hook_im"]


def test_cached_values_survive_without_the_fused_projection(tokens):
    _, cache = make_model("mesh").run_with_cache(tokens, names_filter=["blocks.3.attn.hook_v"])
    value = cache["blocks.3.attn.hook_v"]
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_a_hook_on_a_compiled_model_warns(tokens):
    model = make_model("base")
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="compiled before the hook"):
        model.run_with_hooks(tokens, fwd_hooks=[("loop.0.hook_in", lambda x, hook: None)])


def test_a_copied_model_has_weights_and_hooks_of_its_own(tokens):
    model = make_model("mesh")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.core[0].mlp.up.weight.zero_()
        assert not torch.equal(model(tokens), twin(tokens))
        weight = twin.blocks[3].mlp.W_in
    assert weight.abs().max() == 0 and len(list(twin.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([[0, 61]]), r"0 … 60 .* given 0 … 61"),
        (torch.tensor([[-1, 3]]), "given -1"),
        (torch.zeros(1, 3), "must be integers"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(batch, pos\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"\(batch, pos\)"),
        ("text", "has no tokenizer"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        capture(make_model("mesh"), given)


def test_loss_is_the_next_token_cross_entropy(tokens):
    model = make_model("mesh")
    with torch.no_grad():
        logits, loss = model(tokens, return_type="both")
        per_token = model(tokens, return_type="loss", loss_per_token=True)
    p = logits.double().softmax(-1)
    expected = -torch.stack(
        [p[b, i, tokens[b, i + 1]].log() for b in range(2) for i in range(10)]
    ).view(2, 10)
    torch.testing.assert_close(per_token.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="at least 2 tokens"):
        model(tokens[:, :1], return_type="loss")


def test_slicing_positions_cuts_positions_of_every_point(tokens):
    model = make_model("mesh")
    _, full = model.run_with_cache(tokens)
    _, cut = model.run_with_cache(tokens, pos_slice=(2, 5))
    assert set(cut.keys()) == set(full.keys())
    for name in cut.keys():  # noqa: SIM118  (a cache iterates over its names as a dict does)
        per_head = name.split(".")[-1] in {
            "hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k",
        }  # fmt: skip
        axis = full[name].ndim - (3 if per_head else 2)
        expected = full[name].narrow(axis, 2, 3)
        torch.testing.assert_close(cut[name], expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_caching_everything_in_half_precision_does_not_overflow(dtype, tokens):
    model = make_model("base").to(dtype)
    with torch.no_grad():
        model.embed.weight[:, 0] = 60.0  # 339 after scaling: its square is no float16
        plain = model(tokens)
        cached, _ = model.run_with_cache(tokens)
    assert plain.abs().max() > 0.1
    assert (cached - plain).abs().max() < 0.03 * plain.abs().max()


@pytest.mark.parametrize(
    ("name", "first_stop"),
    [
        ("hook_embed", 0),
        ("transition.hook_in", 1),
        ("loop.1.hook_in", 3),
        ("loop.1.hook_out", 5),
        ("loop.1.read.hook_weights", 5),
        ("loop.1.layer.1.hook_mlp_out", 5),
        ("coda.hook_in", 7),
        ("hook_h_out", 8),
    ],
)
def test_hooks_that_an_early_stop_never_reaches_are_refused(name, first_stop, tokens):
    model = make_model("mesh")
    _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=first_stop)
    assert name in cache
    seen = []
    if first_stop:
        early = {"stop_at_layer": first_stop - 1}
        with pytest.raises(InputError, match="is not reached with stop_at_layer"):
            model.run_with_cache(tokens, names_filter=[name], **early)
        with pytest.raises(InputError, match="is not reached with stop_at_layer"):
            model.run_with_hooks(
                tokens, fwd_hooks=[(name, lambda x, hook: seen.append(1))], **early
            )
    assert not seen


def test_gradients_in_a_cache_have_aliases_too(tokens):
    model = make_model("mesh")
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert cache["loop.0.layer.1.hook_resid_post_grad"] is cache["blocks.2.hook_resid_post_grad"]
    assert cache["blocks.2.hook_resid_post_grad"].abs().max() > 0
    assert 0 not in cache and None not in cache
    with pytest.raises(InputError, match="indexed by a hook name"):
        cache[0]
