"""Looking inside: capture, readout, lenses."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.probes.lenses import MAPPED_LAST as MAPPED_LAST
    from loopscope.probes.lenses import OWN as OWN
    from loopscope.probes.lenses import VALUES as VALUES
    from loopscope.probes.lenses import LensReader as LensReader
    from loopscope.probes.lenses import LensState as LensState
    from loopscope.probes.lenses import layer_states as layer_states
    from loopscope.probes.lenses import lens_states as lens_states
    from loopscope.probes.lenses import lens_values as lens_values
    from loopscope.probes.lenses import samples_at_once as samples_at_once
    from loopscope.probes.lenses import top_tokens as top_tokens
    from loopscope.probes.lenses import why_no_coda_lens as why_no_coda_lens
    from loopscope.probes.lenses import why_no_logit_lens as why_no_logit_lens
    from loopscope.probes.readout import losses as losses
    from loopscope.probes.readout import matched as matched
    from loopscope.probes.readout import read_out as read_out
    from loopscope.probes.readout import read_out_losses as read_out_losses
    from loopscope.probes.ridge_maps import RIDGE as RIDGE
    from loopscope.probes.ridge_maps import RidgeMap as RidgeMap
    from loopscope.probes.ridge_maps import RidgeSums as RidgeSums
    from loopscope.probes.ridge_maps import fold_of_samples as fold_of_samples
    from loopscope.probes.state_capture import capture as capture
    from loopscope.probes.tuned_maps import TunedFold as TunedFold
    from loopscope.probes.tuned_maps import TunedLens as TunedLens
    from loopscope.probes.tuned_maps import brought as brought
    from loopscope.probes.tuned_maps import fingerprint as fingerprint
    from loopscope.probes.tuned_maps import fit_maps as fit_maps
    from loopscope.probes.tuned_maps import sample_hashes as sample_hashes
    from loopscope.probes.tuned_maps import training_tokens as training_tokens

__getattr__, __dir__, __all__ = lazy(__name__)
