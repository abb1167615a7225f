"""Loop collapse: signs (tables to numbers), statistics, verdicts; needs no torch.

Small steps or a high CKA alone are no failure: a model trained to converge has both. So what the
loops do for the loss stands beside the geometry, and a verdict needs both.
"""

from typing import TYPE_CHECKING

from loopscope.lazy import lazy

if TYPE_CHECKING:
    from loopscope.analysis.collapse.criteria import SIGNS as SIGNS
    from loopscope.analysis.collapse.criteria import THRESHOLDS as THRESHOLDS
    from loopscope.analysis.collapse.criteria import YARDSTICKS as YARDSTICKS
    from loopscope.analysis.collapse.criteria import Sign as Sign
    from loopscope.analysis.collapse.findings import Findings as Findings
    from loopscope.analysis.collapse.sign_values import NEEDED as NEEDED
    from loopscope.analysis.collapse.sign_values import per_sample as per_sample
    from loopscope.analysis.collapse.spearman import RankCorrelation as RankCorrelation
    from loopscope.analysis.collapse.spearman import rank_correlation as rank_correlation
    from loopscope.analysis.collapse.statistics import differences as differences
    from loopscope.analysis.collapse.statistics import signs as signs
    from loopscope.analysis.collapse.verdicts import LADDER as LADDER
    from loopscope.analysis.collapse.verdicts import VERDICTS as VERDICTS
    from loopscope.analysis.collapse.verdicts import Verdict as Verdict
    from loopscope.analysis.collapse.verdicts import judge as judge
    from loopscope.analysis.collapse.verdicts import parse_verdicts as parse_verdicts
    from loopscope.analysis.collapse.yardsticks import finding_meanings as finding_meanings

__getattr__, __dir__, __all__ = lazy(__name__)
