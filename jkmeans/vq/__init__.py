"""Stochastic vector quantization, one sample at a time, and schemes that run it in parallel."""

from jkmeans.vq.schemes import SCHEMES, Scheme, make_scheme
from jkmeans.vq.sequential import displacement, quantize
from jkmeans.vq.simulation import Setting, Simulation, distortion, simulate
from jkmeans.vq.steps import STEPS, Steps, make_steps

__all__ = [
    "SCHEMES",
    "STEPS",
    "Scheme",
    "Setting",
    "Simulation",
    "Steps",
    "displacement",
    "distortion",
    "make_scheme",
    "make_steps",
    "quantize",
    "simulate",
]
