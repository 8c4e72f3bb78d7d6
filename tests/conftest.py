"""Test set-up: eight fake CPU devices, strict promotion, data where it can be found."""

import gc
import itertools
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported: see docs/architecture.md, "Fake devices".
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    # Compilation dominates small tests; unoptimised code computes the same.
    + " --xla_backend_optimization_level=0"
    # The older emitters are compiled in three quarters of the time. XLA ends the process at a flag
    # that it does not know, as a later one may.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
)
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("MPLBACKEND", "Agg")

# Many runs compile the same programs; so do the processes of the tests that start commands.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# A shell that starts us in the background has Ctrl-C ignored, and so would every test of it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


_tests_done = itertools.count(1)

_MOST_MAPPINGS = 30_000
"""Of memory, in one process. Linux allows 65,530; where there are no more, XLA crashes."""


@pytest.fixture(autouse=True, scope="module")
def _few_compiled_programs(request):
    """Forgets compiled programs, which each map memory, before a process has too many of them."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):  # Of functools.cache: what this module shares.
            value.cache_clear()
    for name in ("jkmeans.training.programs", "jkmeans.evaluation.model"):
        if name in sys.modules:  # Tests replace parts of what their programs are made of.
            sys.modules[name].recently_prepared.forget()
    _forget_if_many()


@pytest.fixture(autouse=True)
def _few_compiled_programs_of_a_module():
    """The same for modules of hundreds of tests; looked at now and then, because it takes time."""
    yield
    if next(_tests_done) % 40 == 0:
        _forget_if_many()


def _forget_if_many() -> None:
    if _n_mappings() > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def _n_mappings() -> int:
    """Mappings of memory that this process has; 0 where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0
