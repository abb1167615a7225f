"""Gradients, training mode, random numbers, copies: what a run leaves and what it repeats."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.real import llama
from tests.models.wrapped.small import TOKENS, Small, same, seen


class Checkpointed(Small):
    """A core that is computed again for the gradients."""

    reentrant = False

    def loop(self, x):
        for _ in range(self.n_loops):
            x = checkpoint(self.core, x, use_reentrant=self.reentrant)
        return x


class Reentrant(Checkpointed):
    """The older way to do so."""

    reentrant = True


def patched_gradient(model, module, name, weight):
    module.zero_grad()
    out = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x * 3)])
    out.square().sum().backward()
    return module.get_parameter(weight).grad.clone()


def triple_by_hand(module, name, weight):
    count = []

    def hook(m, args, result):
        count.append(1)
        return result * 3 if len(count) == 2 else result

    module.zero_grad()
    handle = module.get_submodule(name).register_forward_hook(hook)
    module(TOKENS).square().sum().backward()
    handle.remove()
    return module.get_parameter(weight).grad.clone()


@pytest.mark.parametrize("make", [Checkpointed, Reentrant])
def test_gradients_of_patched_runs_are_right_under_checkpointing(make):
    module = make()
    model = ls.wrap(module, TOKENS)
    assert all(it.grad for it in model.map.main.iterations) and not model.map.notes
    got = patched_gradient(model, module, "loop.1.core.a.hook_out", "core.b.weight")
    assert torch.allclose(got, triple_by_hand(Small(), "core.a", "core.b.weight"), rtol=1e-5)
    assert checkpoint(module.core, torch.randn(1, 2, 32), use_reentrant=False).requires_grad


def test_gradients_of_patched_runs_are_right_under_transformers_checkpointing():
    grads = []
    for again in (False, True):
        module = llama()
        if again:
            for part in module.modules():
                if hasattr(part, "gradient_checkpointing"):
                    part.gradient_checkpointing = True
                    part._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        module.train()
        model = ls.wrap(module, TOKENS)
        name = "model.layers.1.self_attn.hook_out"
        grads.append(patched_gradient(model, module, name, "model.layers.1.mlp.up_proj.weight"))
        assert any(m.__dict__.get("gradient_checkpointing") for m in module.modules()) == again
    assert torch.equal(*grads)


def test_wrap_leaves_running_means_and_the_mode_as_they_are():
    class Normed(Small):
        def build(self, d):
            self.bn = nn.BatchNorm1d(d)

        def loop(self, x):
            for _ in range(self.n_loops):
                x = self.core(self.bn(x.transpose(1, 2)).transpose(1, 2))
            return x

    module = Normed().train()
    before = {name: b.clone() for name, b in module.named_buffers()}
    model = ls.wrap(module, TOKENS)
    assert all(torch.equal(b, before[name]) for name, b in module.named_buffers())
    assert model.training and module.training
    module.eval()
    assert not model.training and not ls.wrap(module, TOKENS).training
    model.train()
    assert module.training and module.bn.training


def test_runs_in_training_mode_drop_the_same():
    class Dropped(Small):
        def loop(self, x):
            for _ in range(self.n_loops):
                x = nn.functional.dropout(self.core(x), 0.3, self.training)
            return x

    model = ls.wrap(Dropped(), TOKENS)
    model.train()
    state = torch.get_rng_state()
    assert same(ls.capture(model, TOKENS).h_m, ls.capture(model, TOKENS).h_m)
    assert torch.equal(torch.get_rng_state(), state)
    model.seed = None  # to train it
    assert not torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.filterwarnings("error")
def test_random_numbers_that_no_seed_reaches_are_said():
    class Own(Small):
        def loop(self, x):
            self.generator = getattr(self, "generator", None) or torch.Generator()
            x = x + torch.randn(x.shape, generator=self.generator)
            return super().loop(x)

    with pytest.warns(UserWarning, match="two runs on the same input differ"):
        model = ls.wrap(Own(), TOKENS)
    assert model.map.causal is None
    with pytest.raises(InputError, match="no loss"):
        model(TOKENS, return_type="loss")


@pytest.mark.parametrize("flat", [False, True])
def test_noise_is_the_same_for_each_sample_and_another_at_each_token(flat):
    class Noisy(Small):
        def loop(self, x):
            shape = (len(x) * x.shape[1], x.shape[2]) if flat else x.shape
            self.noise = torch.randn(shape).view_as(x)
            return super().loop(x + self.noise)

    module = Noisy()
    model = ls.wrap(module, TOKENS)
    for tokens in (TOKENS, TOKENS[:, :3].repeat(2, 1), TOKENS[:1]):
        model(tokens)
        noise = module.noise
        assert all(torch.equal(one, noise[0]) for one in noise)
        assert len(noise[0].unique(dim=0)) == tokens.shape[1]


def test_noise_that_belongs_to_positions_or_weights_is_drawn_as_it_is():
    class Placed(Small):
        def loop(self, x):
            self.noise = torch.randn(x.shape[1], x.shape[2])
            self.more = torch.randn(5, 7)
            return super().loop(x + self.noise)

    module = Placed()
    ls.wrap(module, TOKENS)(TOKENS)
    assert len(module.noise.unique(dim=0)) == 8 and len(module.more.unique(dim=0)) == 5


class Encoder(nn.Module):
    """A bidirectional encoder with small weights."""

    def __init__(self, std=0.02):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.core = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=std)
        nn.init.normal_(self.embed.weight)
        self.eval()

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(3):
            x = self.core(x)
        return self.head(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pos", [2, 9, 128])
def test_models_that_look_ahead_are_told_from_those_that_do_not(pos, dtype):
    example = torch.randint(50, (2, pos), generator=torch.Generator().manual_seed(0))
    assert ls.wrap(Small().to(dtype), example).map.causal
    encoder = Encoder(0.4 if dtype is torch.bfloat16 else 0.02)
    assert ls.wrap(encoder.to(dtype), example).map.causal is False
    assert ls.wrap(Small().to(dtype), torch.zeros(1, pos, dtype=torch.int64)).map.causal


def test_a_copy_has_its_own_weights_in_every_view():
    model = ls.wrap(Small(), TOKENS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.module.parameters():
            p.mul_(0.5)
    view = twin.with_loops(3)
    assert view.module is twin.module is not model.module
    assert same(ls.capture(view, TOKENS).h_m, seen(twin.module, "core", "out")[:3])


def test_a_wrapped_model_can_be_pickled(tmp_path):
    model = ls.wrap(Small(), TOKENS, loops=3)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(TOKENS), model(TOKENS)) and again.with_loops(5).map.K == 5
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same(ls.capture(loaded, TOKENS).h, ls.capture(model, TOKENS).h)


def test_the_type_in_cfg_is_the_models_after_it_was_cast():
    model = ls.wrap(Small(), TOKENS)
    assert model.cfg.dtype == torch.float32
    model.to(torch.float64)
    assert model.cfg.dtype == torch.float64 == ls.capture(model, TOKENS).h[0].dtype
    model.module.to(torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16 and model.cfg.device == "cpu"
