"""k-means of data larger than memory: chunks flow from disk to the devices, overlapped."""

from jkmeans.streaming.fit import StreamResult, fit_stream
from jkmeans.streaming.outputs import (
    StreamPrediction,
    predict_stream,
    score_stream,
    transform_stream,
)
from jkmeans.streaming.pipeline import precision
from jkmeans.streaming.progress import StreamProgress

__all__ = [
    "StreamPrediction",
    "StreamProgress",
    "StreamResult",
    "fit_stream",
    "precision",
    "predict_stream",
    "score_stream",
    "transform_stream",
]
