"""Stochastic vector quantization, one sample at a time, and schemes that run it in parallel."""

from jkmeans.vq.sequential import displacement, quantize
from jkmeans.vq.steps import STEPS, Steps, make_steps

__all__ = ["STEPS", "Steps", "displacement", "make_steps", "quantize"]
