"""Jacobians: by how much one iteration can move two neighbouring states apart."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from loopscope.errors import InputError
from loopscope.models import Hooked

State = Float[Tensor, "batch pos d_model"]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One iteration as a differentiable map: h(t) → h(t+1).

    Attributes:
        h: h(t), a leaf of the graph, (batch, pos, d_model).
        after: h(t+1), computed from it.
    """

    h: Tensor
    after: Tensor


class _WithGradients(TorchFunctionMode):
    """Lets gradients flow through code that cuts them off, as training through few loops does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:  # torch.no_grad, as HRM's early segments
            args = (True,)
        if func in (Tensor.detach, torch.detach):
            return args[0]
        return func(*args, **(kwargs or {}))


def state_hooks(model: Hooked, path: Sequence[str]) -> tuple[list[str], bool]:
    """Name the hooks at which h(t) can be put.

    Args:
        model: The model.
        path: Where the iterations of its main loop stand, as `Trajectory.path` says.

    Returns:
        A name for each iteration, and whether it moves h(t) for all that reads it
        (`loop.{t}.hook_state`) or, where what makes the state is not known, for the core alone
        (`loop.{t}.hook_in`).
    """
    known = {*model.hook_dict, *model.aliases}
    names = [f"loop.{place}.hook_state" for place in path]
    if all(name in known for name in names):
        return names, True
    return [f"loop.{place}.hook_in" for place in path], False


def separate_iterations(
    model: Hooked, inputs: Any, path: Sequence[str], shape: Sequence[int] | None = None
) -> list[Iteration]:
    """Run a model once so that each of its iterations can be differentiated by itself.

    h(t) is cut from what made it and put back as a leaf, for all that reads it. So the derivative
    of h(t+1) is that of this iteration alone: whatever came before stays as it was. An injected
    h_emb, the anchor h(0) (at t > 0) and the memory of MeSH before the write of iteration t are
    constants; the routers of iteration t read h(t), and are differentiated.

    The model's own code runs, with attention that can be differentiated twice.

    Args:
        model: The model; its parameters are as they were when this returns.
        inputs: What it takes.
        path: Where the iterations of its main loop stand, as `Trajectory.path` says.
        shape: Of a state of these inputs; needed where the model begins with one state for all
            tokens, whose places are moved apart here.

    Returns:
        The iterations, in their order.
    """
    names, _ = state_hooks(model, path)
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def cut(state: Tensor, hook: Any) -> Tensor:
        if entering:
            leaving.append(state)
        whole = state.data if shape is None else state.data.expand(*shape)
        entering.append(whole.clone().requires_grad_())
        return entering[-1].clone()  # a model may write into what it is given

    def end(state: Tensor, hook: Any) -> Tensor:
        leaving.append(state)
        return state.data

    hooks = [*((name, cut) for name in names), (model.coda_hook, end)]
    with _differentiable(model):
        model.run_with_hooks(inputs, fwd_hooks=hooks, return_type=None)
    pairs = zip(entering, leaving, strict=True)
    return [Iteration(h=h, after=after) for h, after in pairs]


@contextmanager
def _differentiable(model: Hooked) -> Iterator[None]:
    """Gradients of states, not of parameters, with attention made of plain products."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _WithGradients():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def jacobian_products(iteration: Iteration) -> tuple[Product, Product]:
    """Give the products with the Jacobian J = ∂h(t+1)/∂h(t) of all positions of a sample.

    The graph of one forward pass serves all of them: Jᵀu is a backward pass, and since it is
    linear in u, Jv is one through that. So a step of the power iteration costs two backward
    passes without gradients of parameters, and no forward pass; forward-mode products would need
    one each, and there is none of fused attention.

    Args:
        iteration: One of `separate_iterations`.

    Returns:
        v → Jv and u → Jᵀu, of tensors (batch, pos, d_model), by sample.

    Raises:
        InputError: if no gradient flows from h(t) to h(t+1), as through quantised weights and
            torch.inference_mode.
        RuntimeError: of torch, where something in the iteration has no second derivative.
    """
    h, after = iteration.h, iteration.after
    probe = torch.zeros_like(after, requires_grad=True)
    back = None
    if after.requires_grad:
        with torch.enable_grad():
            (back,) = torch.autograd.grad(after, h, probe, create_graph=True, allow_unused=True)
    if back is None:
        raise InputError(
            "no gradient flows through an iteration, so it has no Jacobian; take the model in a "
            "floating dtype and without torch.inference_mode."
        )

    def forward(v: Tensor) -> Tensor:
        return _gradient(back, probe, v)

    def backward(u: Tensor) -> Tensor:
        return _gradient(after, h, u)

    return forward, backward


def _gradient(output: Tensor, input: Tensor, weights: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(output, input, weights.to(output), retain_graph=True)
    return gradient


def of_directions(iteration: Iteration, both: tuple[Product, Product]) -> tuple[Product, Product]:
    """Turn the products with J into those with the Jacobian of ĥ(t) → ĥ(t+1), ĥ = h/‖h‖.

    D = P′ N′⁻¹ J N P per token, P = I − ĥĥᵀ and N = ‖h‖ at h(t), P′ and N′ likewise at h(t+1):
    h(t) turns, its length is held, and only the turn of h(t+1) counts.

    Args:
        iteration: One of `separate_iterations`.
        both: Its `jacobian_products`.

    Returns:
        v → Dv and u → Dᵀu.
    """
    forward, backward = both
    before, after = (_unit(x.detach()) for x in (iteration.h, iteration.after))

    def turned(v: Tensor) -> Tensor:
        return _across(forward(_across(v, *before) * before[1]), *after) / after[1]

    def turned_back(u: Tensor) -> Tensor:
        return _across(backward(_across(u, *after) / after[1]) * before[1], *before)

    return turned, turned_back


def _unit(h: Tensor) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    length = torch.where(length == 0, 1, length)
    return h / length, length


def _across(v: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    return v - (v * direction).sum(-1, keepdim=True) * direction


def largest_singular_value(
    forward: Product, backward: Product, start: State, *, steps: int
) -> Float[Tensor, " batch"]:
    """Compute the largest singular value of a linear map for each sample, by power iteration.

    The power iteration v ← JᵀJv/‖·‖, of whose vectors not the last alone is used: the largest
    singular value of J within the space that they span, by the bidiagonalisation of Golub and
    Kahan. It costs the same two products a step and needs far fewer of them. From below: the true
    value is never smaller, but by rounding.

    Args:
        forward: v → Jv, by sample.
        backward: u → Jᵀu, by sample.
        start: The first v, any but 0, (batch, pos, d_model).
        steps: How many steps.

    Returns:
        A number for each sample, in float32 at least; NaN where a product is not finite.
    """
    wide = torch.promote_types(start.dtype, torch.float32)
    v = _scaled(start.to(wide), _size(start.to(wide)))
    u, beta = None, None
    diagonal: list[Tensor] = []
    above: list[Tensor] = []
    for _ in range(steps):
        w = forward(v.to(start.dtype)).to(wide)
        if u is not None and beta is not None:
            w = w - _by_sample(beta, w) * u
        diagonal.append(_size(w))
        u = _scaled(w, diagonal[-1])
        z = backward(u.to(start.dtype)).to(wide) - _by_sample(diagonal[-1], v) * v
        beta = _size(z)
        above.append(beta)
        v = _scaled(z, beta)
    return _largest(torch.stack(diagonal, -1), torch.stack(above, -1)[:, :-1])


def _largest(diagonal: Tensor, above: Tensor) -> Tensor:
    """The largest singular value of bidiagonal matrices, (batch, n) and (batch, n − 1)."""
    matrices = torch.diag_embed(diagonal) + torch.diag_embed(above, offset=1)
    finite = torch.isfinite(matrices).all(-1).all(-1)
    sound = torch.where(finite[:, None, None], matrices, 0).cpu()  # small, and MPS has no SVD
    largest = torch.linalg.svdvals(sound)[:, 0].to(diagonal.device)
    return torch.where(finite, largest, torch.nan)


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _by_sample(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *(1,) * (like.dim() - 1))


def _scaled(x: Tensor, size: Tensor) -> Tensor:
    """x at length 1, or 0 where it is 0."""
    return x / _by_sample(torch.where(size == 0, 1, size), x)


def start_vector(h: State, numbers: Sequence[int]) -> State:
    """Draw where the power iteration begins, the same for a sample in whatever batch.

    Args:
        h: h(t), (batch, pos, d_model).
        numbers: The number of each sample, which seeds it.

    Returns:
        Normal random numbers, on the state's device and in its dtype.
    """
    drawn = [
        torch.randn(h.shape[1:], generator=torch.Generator().manual_seed(number))
        for number in numbers
    ]
    return torch.stack(drawn).to(h)


__all__ = [
    "Iteration",
    "jacobian_products",
    "largest_singular_value",
    "of_directions",
    "separate_iterations",
    "start_vector",
    "state_hooks",
]  # fmt: skip
