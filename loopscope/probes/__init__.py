"""Looking inside: capture, readout, lenses."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.probes.attention_patterns import jensen_shannon as jensen_shannon
    from loopscope.probes.concept_erasure import Eraser as Eraser
    from loopscope.probes.concept_erasure import fit_eraser as fit_eraser
    from loopscope.probes.core_layers import LayerNames as LayerNames
    from loopscope.probes.core_layers import activations as activations
    from loopscope.probes.core_layers import pattern_names as pattern_names
    from loopscope.probes.core_layers import stream_names as stream_names
    from loopscope.probes.early_exits import exit_losses as exit_losses
    from loopscope.probes.early_exits import exit_times as exit_times
    from loopscope.probes.early_exits import quantile_thresholds as quantile_thresholds
    from loopscope.probes.early_exits import readings as readings
    from loopscope.probes.intervention_places import KINDS as KINDS
    from loopscope.probes.intervention_places import Place as Place
    from loopscope.probes.intervention_places import place_named as place_named
    from loopscope.probes.intervention_places import places as places
    from loopscope.probes.interventions import GIVEN as GIVEN
    from loopscope.probes.interventions import CleanRun as CleanRun
    from loopscope.probes.interventions import Intervention as Intervention
    from loopscope.probes.interventions import clean_run as clean_run
    from loopscope.probes.interventions import intervened as intervened
    from loopscope.probes.jacobians import jacobian_products as jacobian_products
    from loopscope.probes.jacobians import largest_singular_value as largest_singular_value
    from loopscope.probes.jacobians import of_directions as of_directions
    from loopscope.probes.jacobians import separate_iterations as separate_iterations
    from loopscope.probes.jacobians import start_vector as start_vector
    from loopscope.probes.jacobians import state_hooks as state_hooks
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
    from loopscope.probes.linear_probes import ALPHAS as ALPHAS
    from loopscope.probes.linear_probes import SampleScores as SampleScores
    from loopscope.probes.linear_probes import TokenScores as TokenScores
    from loopscope.probes.linear_probes import by_sample as by_sample
    from loopscope.probes.linear_probes import cross_validated as cross_validated
    from loopscope.probes.linear_probes import fit_together as fit_together
    from loopscope.probes.linear_probes import group_folds as group_folds
    from loopscope.probes.linear_probes import random_labels as random_labels
    from loopscope.probes.linear_probes import shuffled_labels as shuffled_labels
    from loopscope.probes.paths import LEAST_STATES as LEAST_STATES
    from loopscope.probes.paths import directions as directions
    from loopscope.probes.paths import path_kinds as path_kinds
    from loopscope.probes.paths import token_paths as token_paths
    from loopscope.probes.probe_labels import Labels as Labels
    from loopscope.probes.probe_labels import labels_of_text as labels_of_text
    from loopscope.probes.probe_labels import read_labels as read_labels
    from loopscope.probes.probe_targets import Places as Places
    from loopscope.probes.probe_targets import collect_states as collect_states
    from loopscope.probes.probe_targets import targets as targets
    from loopscope.probes.readout import losses as losses
    from loopscope.probes.readout import matched as matched
    from loopscope.probes.readout import read_out as read_out
    from loopscope.probes.readout import read_out_losses as read_out_losses
    from loopscope.probes.ridge_maps import RIDGE as RIDGE
    from loopscope.probes.ridge_maps import RidgeMap as RidgeMap
    from loopscope.probes.ridge_maps import RidgeSums as RidgeSums
    from loopscope.probes.ridge_maps import fold_of_samples as fold_of_samples
    from loopscope.probes.state_capture import capture as capture
    from loopscope.probes.target_names import HOWS as HOWS
    from loopscope.probes.target_names import TARGETS as TARGETS
    from loopscope.probes.target_names import answers as answers
    from loopscope.probes.target_names import check_targets as check_targets
    from loopscope.probes.target_names import target_kind as target_kind
    from loopscope.probes.tuned_maps import TunedFold as TunedFold
    from loopscope.probes.tuned_maps import TunedLens as TunedLens
    from loopscope.probes.tuned_maps import brought as brought
    from loopscope.probes.tuned_maps import fingerprint as fingerprint
    from loopscope.probes.tuned_maps import fit_maps as fit_maps
    from loopscope.probes.tuned_maps import sample_hashes as sample_hashes
    from loopscope.probes.tuned_maps import training_tokens as training_tokens

__getattr__, __dir__, __all__ = lazy(__name__)
