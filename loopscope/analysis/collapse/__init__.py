"""Loop collapse: signs (tables to numbers), statistics, verdicts; needs no torch.

Small steps or a high CKA alone are no failure: a model trained to converge has both. So what the
loops do for the loss stands beside the geometry, and a verdict needs both.
"""

from loopscope.analysis.collapse.sign_values import NEEDED, per_sample
from loopscope.analysis.collapse.signs import SIGNS, THRESHOLDS, Sign
from loopscope.analysis.collapse.statistics import differences, signs
from loopscope.analysis.collapse.verdicts import VERDICTS, Verdict, judge

__all__ = [
    "NEEDED",
    "SIGNS",
    "THRESHOLDS",
    "VERDICTS",
    "Sign",
    "Verdict",
    "differences",
    "judge",
    "per_sample",
    "signs",
]
