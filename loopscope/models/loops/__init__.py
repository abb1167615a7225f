"""Finding loops: from one traced forward pass to roles, iterations and parameters."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.models.loops.finding import find as find
    from loopscope.models.loops.functions import RecentFunctions as RecentFunctions
    from loopscope.models.loops.identity import Streams as Streams
    from loopscope.models.loops.identity import example_shape as example_shape
    from loopscope.models.loops.loop_map import Iteration as Iteration
    from loopscope.models.loops.loop_map import Loop as Loop
    from loopscope.models.loops.loop_map import LoopCount as LoopCount
    from loopscope.models.loops.loop_map import LoopMap as LoopMap
    from loopscope.models.loops.loop_map import NamedState as NamedState
    from loopscope.models.loops.loop_map import Port as Port
    from loopscope.models.loops.loop_map import Producer as Producer
    from loopscope.models.loops.loop_map import Router as Router
    from loopscope.models.loops.loop_map import Step as Step
    from loopscope.models.loops.loop_map import Unit as Unit
    from loopscope.models.loops.matrices import Weight as Weight
    from loopscope.models.loops.matrices import is_packed as is_packed
    from loopscope.models.loops.matrices import named_weights as named_weights
    from loopscope.models.loops.matrices import rounds_by_batch as rounds_by_batch
    from loopscope.models.loops.mesh_cycle import MeshCycle as MeshCycle
    from loopscope.models.loops.mesh_cycle import routers_of_memory as routers_of_memory
    from loopscope.models.loops.mixing import with_mixing as with_mixing
    from loopscope.models.loops.plain_stack import regroup as regroup
    from loopscope.models.loops.ports import port as port
    from loopscope.models.loops.ports import with_producers as with_producers
    from loopscope.models.loops.producers import made_by as made_by
    from loopscope.models.loops.router_outputs import probabilities as probabilities
    from loopscope.models.loops.router_outputs import weights as weights
    from loopscope.models.loops.router_search import with_routers as with_routers
    from loopscope.models.loops.spec import Spec as Spec
    from loopscope.models.loops.spec import read_spec as read_spec
    from loopscope.models.loops.spec import to_toml as to_toml
    from loopscope.models.loops.tracing import Call as Call
    from loopscope.models.loops.tracing import CallTensor as CallTensor
    from loopscope.models.loops.tracing import Trace as Trace
    from loopscope.models.loops.tracing import devices_of as devices_of
    from loopscope.models.loops.tracing import seeded as seeded
    from loopscope.models.loops.tracing import trace as trace

__getattr__, __dir__, __all__ = lazy(__name__)
