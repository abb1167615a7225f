"""What wrap is given, and what it refuses; other tools' models; attention patterns."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.real import hrm_text, llama
from tests.standins import registry

CASES = {case.name: case for case in registry.CASES}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(5))


class Plain(nn.Module):
    """Two layers and a head."""

    def __init__(self, table: bool = True):
        super().__init__()
        self.embed = nn.Embedding(61, 8) if table else nn.Linear(1, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 61)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_no_example_is_needed_where_there_is_an_embedding():
    assert str(ls.wrap(Plain()).map) == "2"
    with pytest.raises(InputError, match="no embedding table"):
        ls.wrap(Plain(table=False))


def test_an_example_of_floats_makes_a_model_without_tokens():
    model = ls.wrap(Plain(table=False), torch.randn(2, 5, 1))
    states = ls.capture(model, torch.randn(3, 4, 1))
    assert states.tokens is None and states.h_out.shape == (3, 4, 8)
    with pytest.raises(InputError, match="no loss"):
        model(torch.randn(3, 4, 1), return_type="loss")


@pytest.mark.parametrize("given", [3, "text", object()])
def test_an_example_of_another_kind_is_refused(given):
    with pytest.raises(InputError, match="example"):
        ls.wrap(Plain(), given)


def test_a_model_without_layers_says_so(tokens):
    with pytest.raises(InputError, match="no layers were found"):
        ls.wrap(nn.Embedding(61, 8), tokens)


def test_what_is_no_module_is_sent_to_load():
    with pytest.raises(InputError, match=r"ls\.load"):
        ls.wrap("mesh")


def test_a_model_without_values_is_refused_and_an_offloaded_one_is_not(tokens):
    module = llama()
    with torch.device("meta"):
        empty = copy.deepcopy(module).to("meta")
    with pytest.raises(InputError, match="meta device"):
        ls.wrap(empty, tokens)
    wanted = ls.capture(ls.wrap(module, tokens), tokens).h_out
    offloaded = cpu_offload(copy.deepcopy(module), execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in offloaded.parameters())
    model = ls.wrap(offloaded, tokens)
    assert torch.equal(ls.capture(model, tokens).h_out, wanted)


def test_a_native_model_stays_itself():
    model = ls.load("base")
    assert ls.wrap(model) is model


@pytest.mark.parametrize("loops", [0, -1, True, {"core": 0}, {"other": 2}])
def test_a_number_of_iterations_that_is_none_is_refused(loops, tokens):
    model = ls.wrap(CASES["nano_fork"].make(), tokens)
    with pytest.raises(InputError, match="loop"):
        model.with_loops(loops)


def test_an_attribute_that_does_not_set_the_loop_is_found_out(tokens):
    module = CASES["plain"].make()
    looped = CASES["nano_fork"].make()
    looped.decoy = 7
    with pytest.raises(InputError, match="does not set the number"):
        ls.wrap(looped, tokens, spec={"loops": {"attribute": "decoy"}}, loops=5)
    with pytest.raises(InputError, match="no loop"):
        ls.wrap(module, tokens, loops=2)
    assert looped.decoy == 7


def test_a_model_compiled_in_place_still_shows_its_iterations(tokens):
    module = CASES["nano_fork"].make()
    wanted = ls.capture(ls.wrap(copy.deepcopy(module), tokens), tokens)
    module.compile(backend="eager")
    states = ls.capture(ls.wrap(module, tokens), tokens)
    assert all(torch.equal(a, b) for a, b in zip(states.h, wanted.h, strict=True))


def test_a_bridge_of_transformer_lens_is_wrapped_with_its_own_hook_points(tokens):
    module = hrm_text()
    with torch.no_grad():
        seen: list[Tensor] = []
        last = module.model.L_module.layers[-1]
        handle = last.register_forward_hook(lambda *a: seen.append(a[2]))
        wanted = module(tokens, use_cache=False).logits
        handle.remove()
    bridge = build_bridge_from_module(
        copy.deepcopy(module), "HrmTextForCausalLM", hf_config=module.config
    )
    model = ls.wrap(bridge, tokens)
    states = ls.capture(model, tokens, logits=True)
    torch.testing.assert_close(states.logits, wanted, rtol=0, atol=1e-5)
    inner = next(iter(states.others.values()))
    assert inner.K == len(seen) == 6
    for ours, theirs in zip(inner.h_m, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert any(name.endswith(".hook_normalized") for name in model.hook_dict)


def test_attention_patterns_of_every_iteration_are_those_of_eager_attention(tokens):
    module = hrm_text()
    model = ls.wrap(module, tokens)
    wanted: list[Tensor] = []
    part = module.model.L_module.layers[0].self_attn
    module.set_attn_implementation("eager")
    handle = part.register_forward_hook(lambda *a: wanted.append(a[2][1]))
    eager = module(tokens, use_cache=False).logits
    handle.remove()
    module.set_attn_implementation("sdpa")
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    paths = [it.path for it in model.map.loop("L").iterations]
    for path, pattern in zip(paths, wanted, strict=True):
        name = f"loop.{path}.model.L_module.layers.0.self_attn.hook_pattern"
        assert torch.equal(cache[name], pattern)
    assert torch.equal(cache["pattern", 0], wanted[0])
    assert torch.equal(logits, eager)
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-5)
    assert module.config._attn_implementation == "sdpa"


def test_a_pattern_cannot_be_changed_in_silence(tokens):
    model = ls.wrap(llama(), tokens)
    with pytest.raises(InputError, match="can be read, not changed"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: p * 0)]
        )
    assert model.module.config._attn_implementation == "sdpa"
