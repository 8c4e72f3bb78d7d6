"""Predicting for many files by workers that may come and go; each result is written once."""

from jkmeans.dispatch.engine import Options
from jkmeans.dispatch.job import ENGINES, predict_files
from jkmeans.dispatch.output import read_predictions

__all__ = ["ENGINES", "Options", "predict_files", "read_predictions"]
