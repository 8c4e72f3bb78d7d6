"""What every launcher does: parse flags, call one function, turn errors into sentences.

Exit status: 0 done, 2 the user gave something that cannot be used, 3 training collapsed,
128 + signal stopped on request with everything saved. Anything else is a defect and shows a
traceback.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence

# Several fake CPU devices in one process need more threads than cores, before JAX is imported;
# see docs/architecture.md, "Fake devices".
if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("NPROC", "16")

from absl import app, flags

FLAGS = flags.FLAGS


def launch(
    main: Callable[[], object], required: Sequence[str], argv: Sequence[str] | None = None
) -> None:
    """Parses the command line, runs ``main`` and exits.

    Args:
      main: what to run once flags are parsed.
      required: names of flags that must be given.
      argv: the command line; ``sys.argv`` if None.
    """
    argv = list(sys.argv if argv is None else argv)
    app.define_help_flags()
    try:
        rest = FLAGS(argv, known_only=False)
        missing = [f"--{name}" for name in required if not FLAGS[name].present]
        if missing:
            raise flags.Error(f"{' and '.join(missing)} must be given")
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}; accepted: flags, see --help")
        if "config" in FLAGS:
            FLAGS.config.keys()  # A file that could not be loaded says so when it is first used.
    except SystemExit:
        sys.exit(0)  # Help was asked for and printed.
    except Exception as error:  # Config files are the user's programs: they may raise anything.
        fail(_one_line(error), 2)
    _keep_compiled_programs()
    # Imported here, so that a wrong flag is answered at once.
    from jkmeans.errors import CollapseError, UserError
    from jkmeans.interruption import Interrupted

    try:
        main()
    except (UserError, CollapseError, Interrupted) as error:
        fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        where = error.filename or "a file of the run"
        fail(f"cannot write {where}: {error.strerror}; what was saved before is whole", 2)
    sys.exit(0)


def _keep_compiled_programs() -> None:
    """Programs that were compiled once are read from a folder the next time."""
    from jkmeans.datasets import cache_folder  # Not JAX, which reads these when it is imported.

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def fail(sentence: str, status: int) -> None:
    """Prints one sentence on stderr and exits with ``status``."""
    program = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    sys.stdout.flush()
    print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    sys.exit(status)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
