"""Looking inside: capture and readout."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.probes.attention_patterns import jensen_shannon as jensen_shannon
    from loopscope.probes.core_layers import LayerNames as LayerNames
    from loopscope.probes.core_layers import activations as activations
    from loopscope.probes.core_layers import pattern_names as pattern_names
    from loopscope.probes.core_layers import stream_names as stream_names
    from loopscope.probes.early_exits import exit_losses as exit_losses
    from loopscope.probes.early_exits import exit_times as exit_times
    from loopscope.probes.early_exits import quantile_thresholds as quantile_thresholds
    from loopscope.probes.early_exits import readings as readings
    from loopscope.probes.jacobians import jacobian_products as jacobian_products
    from loopscope.probes.jacobians import largest_singular_value as largest_singular_value
    from loopscope.probes.jacobians import of_directions as of_directions
    from loopscope.probes.jacobians import separate_iterations as separate_iterations
    from loopscope.probes.jacobians import start_vector as start_vector
    from loopscope.probes.jacobians import state_hooks as state_hooks
    from loopscope.probes.paths import LEAST_STATES as LEAST_STATES
    from loopscope.probes.paths import directions as directions
    from loopscope.probes.paths import path_kinds as path_kinds
    from loopscope.probes.paths import token_paths as token_paths
    from loopscope.probes.readout import losses as losses
    from loopscope.probes.readout import matched as matched
    from loopscope.probes.readout import read_out as read_out
    from loopscope.probes.readout import read_out_losses as read_out_losses
    from loopscope.probes.ridge_maps import RIDGE as RIDGE
    from loopscope.probes.ridge_maps import RidgeMap as RidgeMap
    from loopscope.probes.ridge_maps import RidgeSums as RidgeSums
    from loopscope.probes.ridge_maps import fold_of_samples as fold_of_samples
    from loopscope.probes.state_capture import capture as capture

__getattr__, __dir__, __all__ = lazy(__name__)
