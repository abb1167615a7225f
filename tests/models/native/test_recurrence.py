"""Every variant against a hand-written unroll over Hugging Face's own layers."""

import pytest
import torch
from transformers import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

from loopscope.models.native.configuration import LoopConfig
from loopscope.models.native.loop_model import LoopModel
from loopscope.probes.state_capture import capture
from tests.conftest import VARIANTS, make_model

NAMES = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "attention.query_key_value": "attn.qkv",
    "attention.dense": "attn.out",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}


def hf_layers(model: LoopModel):
    """Callables of Hugging Face's layers with the model's weights, and its rotary tables."""
    c = model.config
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": c.rotary_pct}
    hf = GPTNeoXConfig(
        hidden_size=c.d_model,
        num_attention_heads=c.n_heads,
        intermediate_size=c.d_mlp,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    rotary = GPTNeoXRotaryEmbedding(hf)

    def layer(block):
        module = GPTNeoXLayer(hf, 0).eval()
        state = {
            f"{theirs}.{kind}": block.state_dict()[f"{ours}.{kind}"]
            for theirs, ours in NAMES.items()
            for kind in ("weight", "bias")
        }
        module.load_state_dict(state)

        def run(x):
            n = x.shape[1]
            mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
            tables = rotary(x, torch.arange(n)[None])
            return module(x, attention_mask=mask, position_embeddings=tables)

        return run

    return [[layer(b) for b in part] for part in (model.prelude, model.core, model.coda)]


def run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def softmax_linear(linear, x):
    scores = (x @ linear.weight.T + linear.bias).exp()
    return scores / scores.sum(-1, keepdim=True)


@torch.no_grad()
def unroll(model: LoopModel, tokens):
    """The states of a variant, written down from PAPER's table and equations."""
    config, layout = model.config, model.config.layout
    prelude, core, coda = hf_layers(model)
    h_emb = model.embed.weight[tokens] * config.d_model**0.5
    pre = run(prelude, h_emb)
    states, raw = [pre], []
    if config.variant == "mesh":
        routers = model.recurrence
        memory = [h_emb] + [torch.zeros_like(h_emb) for _ in range(config.slots - 1)]

        def cycle(router, query, value):
            write, read = softmax_linear(router.write, query), softmax_linear(router.read, query)
            for b in range(config.slots):
                memory[b] = memory[b] + value * write[..., b, None]
            return sum(memory[b] * read[..., b, None] for b in range(config.slots))

        query = pre if config.transition_query == "prelude" else h_emb
        states = [cycle(routers.transition, query, pre)]
    for t in range(config.K):
        h, first = states[-1], states[0]
        h_m = run([core[i] for i in layout.core_layers(t)], h)
        raw.append(h_m)
        if config.variant == "mesh":
            states.append(cycle(model.recurrence.iterations[t], h, h_m))
        elif config.variant == "static":
            a = model.recurrence.coefficients
            states.append(a[0] * h_m + a[1] * first + a[2] * h_emb)
        elif config.variant == "dynamic":
            lin = model.recurrence.coefficients
            a = h @ lin.weight.T + lin.bias
            states.append(a[..., :1] * h_m + a[..., 1:2] * first + a[..., 2:] * h_emb)
        else:
            extra = {"residual": h, "anchor": first, "anchor_emb": h_emb}
            terms = [] if config.variant == "base" else config.variant.split("+")
            states.append(h_m + sum(extra[name] for name in terms))
    return h_emb, states, raw, run(coda, states[-1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["1+2R3+1", "0+1R4+0", "2+1+3+1"])
def test_states_equal_a_manual_unroll(variant, layout, tokens):
    model = make_model(variant, layout)
    h_emb, states, raw, h_out = unroll(model, tokens)
    trajectory = capture(model, tokens)
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(trajectory.h_emb, h_emb, **close)
    for t, state in enumerate(states):
        torch.testing.assert_close(trajectory.h[t], state, **close)
    for t, out in enumerate(raw):
        torch.testing.assert_close(trajectory.h_m[t], out, **close)
    torch.testing.assert_close(trajectory.h_out, h_out, **close)


def test_the_transition_may_look_at_the_embedding(tokens):
    model = make_model("mesh", transition_query="embedding")
    _, states, _, h_out = unroll(model, tokens)
    trajectory = capture(model, tokens)
    torch.testing.assert_close(trajectory.h[0], states[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(trajectory.h_out, h_out, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(trajectory.transition.query, trajectory.h_emb)


def test_mesh_states_are_the_weighted_sums_of_equation_7(tokens):
    """h(t+1) = Σ_i α_i ⊙ h_m(i) + α_pre ⊙ f_pre(h_emb) + α_emb ⊙ h_emb, tolerance 1e-5."""
    model = make_model("mesh", "1+2R3+1", slots=5)
    tr = capture(model, tokens)
    writes = [tr.transition.w_write, *tr.w_write]
    reads = [tr.transition.w_read, *tr.w_read]
    values = [tr.blocks["prelude"][1], *tr.h_m]
    for step, read in enumerate(reads):
        rebuilt = read[..., :1] * tr.h_emb
        for i in range(step + 1):
            rebuilt = rebuilt + (read * writes[i]).sum(-1, keepdim=True) * values[i]
        torch.testing.assert_close(tr.h[step], rebuilt, rtol=1e-5, atol=1e-5)


def test_mesh_starts_with_the_embedding_in_slot_0_and_empty_slots(tokens):
    model = make_model("mesh")
    tr = capture(model, tokens)
    written = tr.transition.w_write.transpose(1, 2)[..., None] * tr.blocks["prelude"][1][:, None]
    start = tr.transition.memory - written
    torch.testing.assert_close(start[:, 0], tr.h_emb, rtol=1e-5, atol=1e-5)
    assert start[:, 1:].abs().max() < 1e-5


def test_untrained_combinations_start_as_base(tokens):
    config = LoopConfig(variant="base", layout="1+2R3+1", d_model=32, n_heads=4, d_vocab=61)
    base = LoopModel(config, seed=3)
    for variant in ("static", "dynamic"):
        other = LoopModel(config.replace(variant=variant), seed=3)
        torch.testing.assert_close(other(tokens), base(tokens))


def test_variants_share_their_initial_weights():
    config = LoopConfig(variant="base", layout="1+2R3+1", d_model=32, n_heads=4, d_vocab=61)
    base = LoopModel(config, seed=3).state_dict()
    mesh = LoopModel(config.replace(variant="mesh"), seed=3).state_dict()
    assert all(torch.equal(mesh[name], value) for name, value in base.items())
    assert not torch.equal(base["embed.weight"], LoopModel(config, seed=4).embed.weight)


def test_output_projections_are_initialised_by_the_unrolled_depth():
    config = LoopConfig(variant="base", layout="1+2R5+1", d_model=256, n_heads=4, d_vocab=61)
    model = LoopModel(config, seed=0)
    expected = 0.02 / (2 * 12) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.out.weight", "mlp.down.weight")):
            assert abs(parameter.std().item() / expected - 1) < 0.02
        elif name.endswith(("qkv.weight", "mlp.up.weight")):
            assert abs(parameter.std().item() / 0.02 - 1) < 0.02
