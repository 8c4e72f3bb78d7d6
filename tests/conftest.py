"""Test set-up: eight fake CPU devices, strict promotion, data where it can be found."""

import os

# Before JAX is imported: see docs/architecture.md, "Fake devices".
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    # Compilation dominates small tests; unoptimised code computes the same.
    + " --xla_backend_optimization_level=0"
)
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
