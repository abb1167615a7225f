"""Jacobians: full ones of torch.func, singular values of torch.linalg, known linear maps."""

from dataclasses import replace

import pytest
import torch
from torch.func import jacrev, jvp, vjp

import loopscope as ls
from loopscope.errors import InputError
from loopscope.probes.jacobians import (
    jacobian_products,
    largest_singular_value,
    of_directions,
    separate_iterations,
    start_vector,
    state_hooks,
)
from tests.standins.linear import Linear, wrapped_linear
from tests.standins.registry import LOOPED

STEPS = 40
PATH = ("0", "1", "2")


def contraction(iteration, steps=STEPS):
    forward, backward = jacobian_products(iteration)
    return largest_singular_value(
        forward, backward, start_vector(iteration.h, range(len(iteration.h))), steps=steps
    )


def by_hand(model, tokens, t):
    """h(t) → h(t+1) by a hook that puts h(t) there, the way a user would, and h(t) itself."""
    h = model.capture(tokens).h[t]

    def iteration(state):
        after = []
        end = f"loop.{t + 1}.hook_in" if t + 1 < model.K else "coda.hook_in"
        hooks = [
            (f"loop.{t}.hook_in", lambda x, hook: state.view_as(x)),
            (end, lambda x, hook: after.append(x)),
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        return after[0]

    return iteration, h


@pytest.mark.parametrize("variant", ["base", "mesh", "residual+anchor_emb"])
def test_contraction_is_the_largest_singular_value_of_the_full_jacobian(make_model, variant):
    model = make_model(variant, d_model=16).double()
    tokens = torch.randint(61, (1, 4), generator=torch.Generator().manual_seed(1))
    for t, iteration in enumerate(separate_iterations(model, tokens, PATH)):
        function, h = by_hand(model, tokens, t)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            full = jacrev(function)(h).reshape(h.numel(), h.numel())
        torch.testing.assert_close(contraction(iteration)[0], torch.linalg.svdvals(full)[0])


# torch.func.jvp compiles decompositions by torch.jit.script, of which torch itself warns
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_products_are_those_of_torch_func(make_model, tokens):
    model = make_model("mesh").double()
    iteration = separate_iterations(model, tokens, PATH)[1]
    function, h = by_hand(model, tokens, 1)
    forward, backward = jacobian_products(iteration)
    v, u = (start_vector(h, numbers) for numbers in ((1, 2), (3, 4)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        after, pushed = jvp(function, (h,), (v,))
        _, pull = vjp(function, h)
        torch.testing.assert_close(forward(v), pushed)
        torch.testing.assert_close(backward(u), pull(u)[0])
    torch.testing.assert_close(iteration.after, after)


def test_directions_have_the_jacobian_of_the_map_between_them(make_model):
    model = make_model("residual", d_model=16).double()
    tokens = torch.randint(61, (1, 4), generator=torch.Generator().manual_seed(1))
    iteration = separate_iterations(model, tokens, PATH)[0]
    function, h = by_hand(model, tokens, 0)
    lengths = h.norm(dim=-1, keepdim=True)

    def between(direction):
        direction = direction / direction.norm(dim=-1, keepdim=True)
        after = function(lengths * direction)
        return after / after.norm(dim=-1, keepdim=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        full = jacrev(between)(h / lengths).reshape(h.numel(), h.numel())
    turned = of_directions(iteration, jacobian_products(iteration))
    value = largest_singular_value(*turned, start_vector(h, [0]), steps=STEPS)
    torch.testing.assert_close(value[0], torch.linalg.svdvals(full)[0])


@pytest.fixture
def A():
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(4)) / 4


def test_a_linear_iteration_has_its_spectral_norm_wherever_it_is(A):
    model = wrapped_linear(A)
    tokens = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
    path = model.capture(tokens).path
    for iteration in separate_iterations(model, tokens, path):
        expected = torch.linalg.matrix_norm(A, 2)
        torch.testing.assert_close(contraction(iteration, 12), expected.expand(3))


def test_power_iteration_gives_the_svd_of_any_matrix_from_below():
    matrix = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = torch.linalg.svdvals(matrix)[0]
    start = torch.randn(1, 1, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = [
        largest_singular_value(
            lambda v: v @ matrix.T, lambda u: u @ matrix, start, steps=steps
        ).item()
        for steps in (1, 2, 4, 8, 16, 30, 40)
    ]
    assert values == sorted(values) or max(values) - min(values[-2:]) < 1e-9
    assert max(values) <= exact * (1 + 1e-9)
    assert values[-1] == pytest.approx(exact.item(), rel=1e-6)


def test_samples_do_not_depend_on_their_batch(make_model, tokens):
    model = make_model("mesh").double()
    both = [contraction(x, 6) for x in separate_iterations(model, tokens, PATH)]
    for i in range(2):
        for t, iteration in enumerate(separate_iterations(model, tokens[i : i + 1], PATH)):
            value = largest_singular_value(
                *jacobian_products(iteration), start_vector(iteration.h, [i]), steps=6
            )
            torch.testing.assert_close(value[0], both[t][i])


def test_states_and_parameters_are_left_as_they_were(make_model, tokens):
    model = make_model("mesh")
    model.embed.weight.requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    trajectory = model.capture(tokens)
    for t, iteration in enumerate(separate_iterations(model, tokens, PATH)):
        torch.testing.assert_close(iteration.h, trajectory.h[t])
        torch.testing.assert_close(iteration.after, trajectory.h[t + 1])
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_points())


MECHANICS = (
    "gated",
    "recurring",
    "two_clocks",
    "tied_stack",
    "lora_per_loop",
    "mesh_port",
    "token_routed",
)


@pytest.mark.parametrize("case", [c for c in LOOPED if c.name in MECHANICS], ids=lambda c: c.name)
def test_every_mechanic_has_jacobians(case):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (2, 7), generator=generator)
    model = ls.wrap(case.make(), example=tokens)
    trajectory = model.capture(tokens)
    found = separate_iterations(model, tokens, trajectory.path)
    assert len(found) == trajectory.K and state_hooks(model, trajectory.path)[1]
    for t, iteration in enumerate(found):
        torch.testing.assert_close(iteration.after, trajectory.h[t + 1], rtol=1e-4, atol=1e-4)
        assert (contraction(iteration, 2) > 0).all()


def test_a_core_without_gradients_is_told(A):
    tokens = torch.arange(4).view(1, 4)
    model = wrapped_linear(A)
    iteration = separate_iterations(model, tokens, model.capture(tokens).path)[0]
    with pytest.raises(InputError, match="no gradient flows"):
        jacobian_products(replace(iteration, after=iteration.after.detach()))


def test_a_gradient_cut_by_the_model_flows_all_the_same(A):
    class Cut(Linear):
        def forward(self, tokens):
            h = self.embed(tokens)
            with torch.no_grad():
                h = self.core(h)
            for _ in range(self.K - 1):
                h = self.core(h.detach())
            return self.head(h)

    model = ls.wrap(Cut(A), example=torch.arange(6).view(1, 6))
    tokens = torch.arange(4).view(1, 4)
    for iteration in separate_iterations(model, tokens, model.capture(tokens).path):
        torch.testing.assert_close(contraction(iteration, 12)[0], torch.linalg.matrix_norm(A, 2))
