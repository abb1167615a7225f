"""Looking inside: capture and readout."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.probes.concept_erasure import Eraser as Eraser
    from loopscope.probes.concept_erasure import fit_eraser as fit_eraser
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
