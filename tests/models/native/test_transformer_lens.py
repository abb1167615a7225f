"""TransformerLens's own tools on our models: right where they can be, an error where not."""

import pytest
import torch
from transformer_lens import ActivationCache, patching
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights
from transformer_lens.tools.analysis import logit_lens
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

from loopscope.errors import InputError
from loopscope.probes.state_capture import capture
from tests.conftest import make_model

ADDITIVE = [("vanilla", "6"), ("base", "1+2R3+1")]
MIXING = ["residual", "anchor", "anchor_emb", "static", "dynamic", "mesh"]


def test_models_satisfy_transformer_lens_protocols():
    model = make_model("mesh")
    assert isinstance(model, TransformerLensModel)
    assert isinstance(model, TransformerLensModelWithWeights)


@pytest.mark.parametrize(("variant", "layout"), ADDITIVE)
def test_decompositions_of_additive_models_sum_to_the_stream(variant, layout, tokens):
    model = make_model(variant, layout)
    _, cache = model.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache)
    for layer in (1, 4, model.cfg.n_layers):
        stream = cache.accumulated_resid(layer)[-1]
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(cache.decompose_resid(layer).sum(0), stream, **close)
        full = cache.get_full_resid_decomposition(layer, expand_neurons=True)
        torch.testing.assert_close(full.sum(0), stream, **close)


@pytest.mark.parametrize("variant", MIXING)
def test_decompositions_across_an_iteration_raise_and_name_the_boundary(variant, tokens):
    model = make_model(variant)
    _, cache = model.run_with_cache(tokens)
    first = "loop.0.hook_in" if variant == "mesh" else "loop.1.hook_in"
    attempts = [
        cache.decompose_resid,
        cache.stack_head_results,
        lambda: cache.stack_neuron_results(8),
        cache.get_full_resid_decomposition,
        lambda: direct_logit_attribution(model, tokens, 3),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match=rf"would cross {first}"):
            attempt()


@pytest.mark.parametrize(("variant", "safe"), [("residual", 2), ("anchor", 2), ("mesh", 0)])
def test_decompositions_within_the_first_iteration_are_exact(variant, safe, tokens):
    model = make_model(variant)
    _, cache = model.run_with_cache(tokens)
    parts = cache.decompose_resid(safe)
    stream = cache[f"blocks.{safe}.hook_resid_pre"]
    torch.testing.assert_close(parts.sum(0), stream, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=f"at most up to layer {safe}"):
        cache.decompose_resid(safe + 1)


@pytest.mark.parametrize("variant", ["base", "residual", "mesh"])
def test_the_logit_lens_reads_every_virtual_layer_and_ends_at_the_logits(variant, tokens):
    model = make_model(variant)
    result = logit_lens(model, tokens, positions=None)
    with torch.no_grad():
        logits = model(tokens)
        h1 = capture(model, tokens).h[1]
        at_h1 = model.unembed(model.ln_final(h1))
    assert len(result.labels) == 9
    torch.testing.assert_close(result.values[-1], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.values[3], at_h1, rtol=1e-4, atol=1e-4)


def test_without_a_coda_the_mixed_final_state_is_not_mistaken_for_the_last_layers_output(tokens):
    model = make_model("residual", "0+2R2+0")
    logits, cache = model.run_with_cache(tokens)
    with pytest.raises(InputError, match=r"made at coda\.hook_in"):
        cache.accumulated_resid()
    torch.testing.assert_close(
        model.unembed(model.ln_final(cache["hook_h_out"])), logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("variant", ["vanilla", "mesh"])
def test_activation_patching_tools_agree_with_patches_by_hand(variant, tokens):
    model = make_model(variant, "4" if variant == "vanilla" else "1+1R2+1")
    _, clean = model.run_with_cache(tokens)
    corrupt = tokens.flip(1)

    def metric(logits):
        return logits[0, -1, 5] - logits[0, -1, 6]

    with torch.no_grad():
        table = patching.get_act_patch_resid_pre(model, corrupt, clean, metric)
        heads = patching.get_act_patch_attn_head_out_all_pos(model, corrupt, clean, metric)
    for v, pos in [(0, 3), (2, 10), (3, 0)]:

        def put(x, hook, pos=pos):
            x = x.clone()
            x[:, pos] = clean[hook.name][:, pos]
            return x

        with torch.no_grad():
            by_hand = metric(
                model.run_with_hooks(corrupt, fwd_hooks=[(f"blocks.{v}.hook_resid_pre", put)])
            )
        torch.testing.assert_close(table[v, pos], by_hand)
    assert heads.shape == (4, 4) and heads.std() > 0


def test_edge_attribution_and_direct_path_patching_are_refused(tokens):
    model = make_model("mesh")
    _, clean = model.run_with_cache(tokens)
    edges = EdgeAttributionConfig(granularity="edge")
    with pytest.raises(InputError, match="projection is fused"):
        attribution_patch(model, tokens, tokens.flip(1), lambda x: x.mean(), edges)
    with pytest.raises(InputError, match="projection is fused"):
        patching.get_act_patch_direct_path(
            model, tokens, clean, clean, lambda x: x.mean(), src_layer=0, src_head=0
        )


def test_head_weights_rebuild_the_attention_output(tokens):
    model = make_model("base")
    _, cache = model.run_with_cache(tokens)
    attn = model.blocks[4].attn
    x = cache["blocks.4.ln1.hook_normalized"]
    for name in ("Q", "K", "V"):
        weight, bias = getattr(attn, f"W_{name}"), getattr(attn, f"b_{name}")
        built = torch.einsum("bpd,hde->bphe", x, weight) + bias
        found = cache[f"blocks.4.attn.hook_{name.lower()}"]
        torch.testing.assert_close(built, found, rtol=1e-4, atol=1e-5)
    out = torch.einsum("bphe,hed->bpd", cache["blocks.4.attn.hook_z"], attn.W_O) + attn.b_O
    torch.testing.assert_close(out, cache["blocks.4.hook_attn_out"], rtol=1e-4, atol=1e-5)
    mlp = model.blocks[4].mlp
    pre = cache["blocks.4.ln2.hook_normalized"] @ mlp.W_in + mlp.b_in
    torch.testing.assert_close(pre, cache["blocks.4.mlp.hook_pre"], rtol=1e-4, atol=1e-5)
    post = cache["blocks.4.mlp.hook_post"] @ mlp.W_out + mlp.b_out
    torch.testing.assert_close(post, cache["blocks.4.hook_mlp_out"], rtol=1e-4, atol=1e-5)


def test_the_scale_of_a_norm_is_its_standard_deviation(tokens):
    model = make_model("mesh")
    _, cache = model.run_with_cache(tokens)
    x = cache["blocks.3.hook_resid_pre"]
    expected = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(cache["blocks.3.ln1.hook_scale"], expected, rtol=1e-5, atol=1e-6)


def test_cache_slices_stay_loop_caches(tokens):
    _, cache = make_model("mesh").run_with_cache(tokens)
    one = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(one["loop.1.hook_in"], cache["loop.1.hook_in"][1])
    with pytest.raises(InputError, match="would cross"):
        one.decompose_resid()


@pytest.mark.parametrize(("variant", "layout"), ADDITIVE)
def test_direct_logit_attributions_sum_to_the_logits_less_the_final_norms_bias(
    variant, layout, tokens
):
    model = make_model(variant, layout)
    logits, cache = model.run_with_cache(tokens)
    bias = model.ln_final.bias @ model.W_U
    expected = (logits - bias)[..., 7]
    close = {"rtol": 1e-4, "atol": 1e-4}
    found = cache.logit_attrs(cache.decompose_resid(), tokens=7).sum(0)
    torch.testing.assert_close(found, expected, **close)
    found = direct_logit_attribution(model, tokens, 7, pos=None)
    torch.testing.assert_close(found.attribution.sum(0), expected, **close)
    n = model.cfg.n_layers
    whole = cache.get_full_resid_decomposition(
        n, apply_ln=True, expand_neurons=True, project_output_onto=model.W_U[:, 7]
    )
    torch.testing.assert_close(whole.sum(0), expected, **close)


@pytest.mark.parametrize("mlp_input", [False, True])
def test_a_normed_decomposition_sums_to_what_the_layers_norm_gives(mlp_input, tokens):
    model = make_model("vanilla", "4", parallel_residual=False)
    _, cache = model.run_with_cache(tokens)
    parts = cache.decompose_resid(2, apply_ln=True, mlp_input=mlp_input)
    norm = "ln2" if mlp_input else "ln1"
    expected = cache[f"blocks.2.{norm}.hook_normalized"]
    expected = expected - getattr(model.blocks[2].weights, norm).bias
    torch.testing.assert_close(parts.sum(0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [-2, 9])
def test_layers_that_do_not_exist_are_refused_by_decompositions(layer, tokens):
    _, cache = make_model("base").run_with_cache(tokens)
    for tool in (cache.decompose_resid, cache.accumulated_resid, cache.stack_head_results):
        with pytest.raises(InputError, match="layer must be 0 … 8"):
            tool(layer)
