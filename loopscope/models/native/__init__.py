"""loopscope's own models: configuration, block, recurrence, model, checkpoints."""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.models.native import checkpoint as checkpoint
    from loopscope.models.native.checkpoint import load_checkpoint as load_checkpoint
    from loopscope.models.native.checkpoint import read_config as read_config
    from loopscope.models.native.checkpoint import read_json as read_json
    from loopscope.models.native.checkpoint import read_tokenizer as read_tokenizer
    from loopscope.models.native.checkpoint import weight_files as weight_files
    from loopscope.models.native.configuration import Layout as Layout
    from loopscope.models.native.configuration import LoopConfig as LoopConfig
    from loopscope.models.native.configuration import parse_variant as parse_variant
    from loopscope.models.native.gpt_neox import config_from_hf as config_from_hf
    from loopscope.models.native.gpt_neox import is_gpt_neox as is_gpt_neox
    from loopscope.models.native.gpt_neox import load_hf as load_hf
    from loopscope.models.native.loop_model import LoopModel as LoopModel
    from loopscope.models.native.parameter_counts import ParameterCount as ParameterCount
    from loopscope.models.native.parameter_counts import count_parameters as count_parameters
    from loopscope.models.native.parameter_counts import layout_counts as layout_counts
    from loopscope.models.native.parameter_counts import model_counts as model_counts
    from loopscope.models.native.parameter_counts import paper_counts as paper_counts

__getattr__, __dir__, __all__ = lazy(__name__)
