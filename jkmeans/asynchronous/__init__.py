"""Workers that share a version through a parameter server, each at its own pace.

Ray is imported when a run begins, and not before.
"""

from jkmeans.asynchronous.gradients import run_sgd
from jkmeans.asynchronous.quantization import run_vq
from jkmeans.problems import Problem

__all__ = ["Problem", "run_sgd", "run_vq"]
