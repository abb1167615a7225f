"""Trace: every module call of one forward pass, with its tensors, in order."""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loopscope.errors import EXAMPLE, InputError
from loopscope.models.loops.functions import Function, FunctionLog, Lookup, Making
from loopscope.models.loops.loop_map import Step
from loopscope.models.loops.matrices import weights_in
from loopscope.models.loops.producers import Made, Makers

DEPTH = 3
"""How deep tensors are looked for in nested arguments and results."""


@dataclass(frozen=True)
class CallTensor:
    """A tensor in a call's arguments or result, how to get to it, and what gradient flows on to.

    `key` is the identity of the object that the model itself handed on, to which `origin` refers as
    long as it exists; `tensor` is a copy of it.
    """

    where: tuple[Step, ...]
    tensor: Tensor
    node: Any = None
    key: int = 0
    origin: Callable[[], Tensor | None] = lambda: None


@dataclass(eq=False)
class Call:
    """One call of one module.

    Attributes:
        index: Its place in the order in which calls begin.
        module: Canonical name of the module.
        number: Which call of this module, from 0.
        parent: The call it was made in; None for the root.
        start, end: Ticks at which it began and ended.
        grad: Whether gradients were recorded when it began.
        inputs, outputs: Its floating tensors.
        children: The calls made in it.
        integers: Shapes of its integer tensor arguments.
        variables: Names under which the code that made it knows tensors, by their identity.
    """

    index: int
    module: str
    number: int
    parent: "Call | None"
    start: int
    end: int = -1
    grad: bool = True
    inputs: list[CallTensor] = field(default_factory=list)
    outputs: list[CallTensor] = field(default_factory=list)
    children: list["Call"] = field(default_factory=list)
    integers: list[tuple[int, ...]] = field(default_factory=list)
    variables: dict[int, list[str]] = field(default_factory=dict)

    def descendants(self) -> Iterator["Call"]:
        """All calls made in it, in order."""
        for child in self.children:
            yield child
            yield from child.descendants()


@dataclass(kw_only=True)
class Trace:
    """All module calls of one forward pass.

    Attributes:
        root: The call of the model itself.
        calls: Every call, in the order in which they began.
        modules: Canonical name to module.
        uses: (tick, name) of every use of a parameter, or of a matrix that is none, by a torch
            function or a module that keeps it packed.
        functions: Every torch function that gave or changed tensors, in order.
        objects: Identity to tensor of all that the functions and calls handed on.
        origins: Identities of tensors that were there before: parameters, buffers, arguments.
        result: What the model returned.
        random: Whether random numbers were drawn.
        mutates: Whether a tensor was changed in place after it was noted.
        lookups: The tables in which rows were looked up, in order.
        tensors: The parameters and matrices in `uses` by name, where they are tensors.
        makers: (index of a call, place among its arguments) to what made the tensor there.
        made: Identity of a tensor to what made it.
    """

    root: Call
    calls: list[Call]
    modules: dict[str, nn.Module]
    uses: list[tuple[int, str]]
    result: Any
    random: bool
    mutates: bool = False
    functions: list[Function] = field(default_factory=list)
    objects: dict[int, Tensor] = field(default_factory=dict)
    origins: frozenset[int] = frozenset()
    lookups: list[Lookup] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    makers: dict[tuple[int, tuple[Step, ...]], Made] = field(default_factory=dict)
    made: dict[int, Made] = field(default_factory=dict)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How often each module was called."""
        return dict(Counter(call.module for call in self.calls))

    @cached_property
    def known(self) -> frozenset[int]:
        """Identities of the tensors of which it is seen where they are from."""
        return self.origins.union(*(function.results for function in self.functions))

    @cached_property
    def making(self) -> Making:
        """How tensors were made by its functions."""
        return Making(self.functions)

    @cached_property
    def numbered(self) -> dict[tuple[str, int], Call]:
        """Each call by its module and which call of it."""
        return {(call.module, call.number): call for call in self.calls}


class _Recorder:
    """Notes module calls as they begin and finish, and the tensors that go in and come out.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = dict(module.named_modules())
        self.names = {id(part): name for name, part in self.modules.items()}
        self.clock = [0]
        self.tensors: dict[str, Tensor] = dict(module.named_parameters())
        names = {id(tensor): name for name, tensor in self.tensors.items()}
        self.packed: dict[str, str] = {}
        first: dict[Any, str] = {}
        for prefix, part in self.modules.items():
            for weight in weights_in(part):
                name = f"{prefix}.{weight.name}".lstrip(".")
                name = first.setdefault(weight.key, name)  # quantising copies what was shared
                value = getattr(part, weight.name)
                if not isinstance(value, Tensor):
                    self.packed[prefix] = name
                elif id(value) not in names:
                    names[id(value)] = name
                    self.tensors.setdefault(name, value)
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.makers = Makers(self.stack)
        self.functions = FunctionLog(names, self.clock, self.makers)
        self.numbers: dict[str, int] = {}
        self.versions: list[tuple[Tensor, int]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which every module's calls are noted."""
        with ExitStack() as hooks:
            for module in self.modules.values():
                pre = module.register_forward_pre_hook(self.begin, with_kwargs=True)
                post = module.register_forward_hook(self.finish, with_kwargs=True)
                hooks.callback(pre.remove)
                hooks.callback(post.remove)
            yield

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a call begins (a forward pre-hook).

        Args:
            module: The module that is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self.clock[0] += 1
        self.makers.pause()
        name = self.names[id(module)]
        number = self.numbers.get(name, 0)
        self.numbers[name] = number + 1
        parent = self.stack[-1] if self.stack else None
        call = Call(len(self.calls), name, number, parent, self.clock[0])
        call.grad = torch.is_grad_enabled()
        call.inputs = [
            *(t for i, value in enumerate(args) for t in _tensors(value, ("args", i))),
            *(t for key, value in kwargs.items() for t in _tensors(value, ("kwargs", key))),
        ]
        call.integers = [
            tuple(value.shape)
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and not value.is_floating_point()
        ]
        self.watch((args, kwargs))
        if name in self.packed:
            self.functions.seen.append((self.clock[0], self.packed[name]))
        if parent is not None:
            call.variables = _variables(self.modules[parent.module])
            parent.children.append(call)
        self.calls.append(call)
        self.stack.append(call)
        self.makers.begin(call)

    def finish(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Note that the innermost call ends (a forward hook).

        Args:
            module: The module that was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            result: What it returned.
        """
        self.clock[0] += 1
        self.makers.pause()
        call = self.stack.pop()
        call.end = self.clock[0]
        call.outputs = list(_tensors(result, ()))
        self.watch(result)
        self.makers.finish(call)

    def watch(self, value: Any) -> None:
        """Keep the versions of the tensors in a value, to see whether they change in place.

        Args:
            value: Arguments or a result.
        """
        for leaf in tree_leaves(value):
            if not isinstance(leaf, Tensor):
                continue
            self.functions.keep((leaf,))
            if not leaf.is_inference():
                self.versions.append((leaf, leaf._version))

    def mutates(self) -> bool:
        """Whether a tensor was changed in place after it was noted."""
        return any(tensor._version != version for tensor, version in self.versions)

    def place(self) -> str:
        """Where the forward pass is, as part of a sentence; empty before its first call."""
        return f" in {self.stack[-1].module or 'its own forward'}" if self.stack else ""


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Run a model once and note every module call; compiled code calls no hooks.

    Args:
        module: The model; its state and hooks are as before afterwards.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments.

    Returns:
        The calls, in order.

    Raises:
        InputError: if the forward pass fails, naming the module in which it did.
    """
    recorder = _Recorder(module)
    inference = any(p.is_inference() for p in module.parameters())
    before = _random_state(module)
    mode = torch.no_grad() if inference else torch.enable_grad()
    with recorder.attached(), mode, recorder.functions:
        try:
            result = module(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"the model's forward pass fails on the example{recorder.place()}: "
                f"{type(error).__name__}: {error}. Give an {EXAMPLE} that the model can run: the "
                "arguments of its forward, as a tensor, a tuple or a dict."
            ) from error
    calls = recorder.calls
    if not calls or calls[0].module != "":
        raise InputError(
            "the model's forward pass calls no hooks, so nothing can be seen: is it a compiled or "
            "scripted model? Give the original module."
        )
    return Trace(
        root=calls[0],
        calls=calls,
        modules=recorder.modules,
        uses=recorder.functions.seen,
        functions=recorder.functions.functions,
        objects=recorder.functions.tensors,
        origins=_origins(module, args, kwargs),
        result=result,
        random=not _same(before, _random_state(module)),
        mutates=recorder.mutates(),
        lookups=recorder.functions.lookups,
        tensors=recorder.tensors,
        makers=recorder.makers.entering,
        made=recorder.makers.known,
    )


def _tensors(value: Any, where: tuple[Step, ...], depth: int = DEPTH) -> Iterator[CallTensor]:
    """Floating tensors in a value, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield CallTensor(
                where, value.detach().clone(), value.grad_fn, id(value), weakref.ref(value)
            )
    elif depth == 0:
        return
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if isinstance(key, str | int):
                yield from _tensors(part, (*where, key), depth - 1)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _tensors(part, (*where, i), depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name, None), (*where, entry.name), depth - 1)


def _origins(module: nn.Module, args: Any, kwargs: Any) -> frozenset[int]:
    """Identities of the tensors that a forward pass finds: of the model, and its arguments."""
    values = [args, kwargs, *(value for part in module.modules() for value in vars(part).values())]
    held = [tensor for value in values for tensor in _held(value, DEPTH)]
    return frozenset(id(tensor) for tensor in (*held, *module.parameters(), *module.buffers()))


def _held(value: Any, depth: int) -> Iterator[Tensor]:
    """Tensors in a value, in whatever it holds them."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for part in value.values():
            yield from _held(part, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for part in value:
            yield from _held(part, depth - 1)
    elif depth and is_dataclass(value) and not isinstance(value, type):
        for part in vars(value).values():
            yield from _held(part, depth - 1)


def _variables(module: nn.Module) -> dict[int, list[str]]:
    """Names of the tensors that the running forward of a module knows, by identity."""
    variables: dict[int, list[str]] = {}
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        names = frame.f_locals
        if names.get("self") is module and frame.f_code.co_name == "_call_impl":
            break
        if any(value is module for value in names.values()):  # its forward, and its own helpers
            for name, value in names.items():
                if isinstance(value, Tensor):
                    variables.setdefault(id(value), []).append(name)
        frame = frame.f_back
    return variables


def devices_of(module: nn.Module) -> list[torch.device]:
    """The accelerators that a model's parameters lie on.

    Args:
        module: The model.

    Returns:
        The devices, sorted by name; none for a model on the CPU.
    """
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    return sorted(devices, key=str)


def _random_state(module: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices_of(module))]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextmanager
def seeded(module: nn.Module, seed: int) -> Iterator[None]:
    """A context in which the generators start from a seed, and which leaves them as they were.

    Args:
        module: The model, for its devices.
        seed: The seed.

    Returns:
        The context.
    """
    with torch.random.fork_rng(devices=devices_of(module)):
        torch.manual_seed(seed)
        yield
