"""What a trained run is good for: embed, predict, evaluate, from its folder alone.

`load_model` restores a network and its clusters (`model`), `predict` and `embed` ask it for
examples (`prediction`), and `evaluate` and `predict_file` are what the launchers call (`commands`).
"""

from jkmeans.evaluation.commands import evaluate, predict_file
from jkmeans.evaluation.model import TrainedModel, load_model
from jkmeans.evaluation.prediction import Prediction, compute_in_blocks, embed, predict

__all__ = [
    "Prediction",
    "TrainedModel",
    "compute_in_blocks",
    "embed",
    "evaluate",
    "load_model",
    "predict",
    "predict_file",
]
