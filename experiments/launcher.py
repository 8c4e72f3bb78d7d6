"""What every launcher does: parse flags, join other processes, call one function, answer errors.

Exit status: 0 done, 2 the user gave something that cannot be used, 3 training collapsed, 75 another
process was lost (start all again), 128 + signal stopped on request with everything saved. Anything
else is a defect and shows a traceback.
"""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

# Several fake CPU devices in one process need more threads than cores, before JAX is imported;
# see docs/architecture.md, "Fake devices".
if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("NPROC", "16")

from absl import app, flags

from experiments import config_flag
from experiments.config_flag import one_line

FLAGS = flags.FLAGS
_PROGRAM = os.path.splitext(os.path.basename(sys.argv[0]))[0]
_OF_PROCESSES = ("processes", "process_id", "coordinator", "join_seconds", "lost_seconds",
                 "stuck_seconds")  # fmt: skip
_MOST_SECONDS = 10**7
"""Four months; JAX and XLA take no number that 32 bits do not hold."""


def launch(
    main: Callable[..., object],
    required: Sequence[str],
    argv: Sequence[str] | None = None,
    *,
    several: bool = True,
    takes_command: bool = False,
    fields: str = "",
) -> None:
    """Parses the command line, joins the other processes if there are any, runs ``main``, exits.

    Args:
      main: what to run once flags are parsed.
      required: names of flags that must be given.
      argv: the command line; ``sys.argv`` if None.
      several: whether several processes can do it together.
      takes_command: whether what stands after ``--`` is a command, which ``main`` is called with,
        and whose exit status it returns.
      fields: ``module:name`` of what a config consists of: fields by name, or a function that has
        them of a config. For help and for errors.
    """
    from jkmeans.processes import heartbeat

    heartbeat.start()
    with _leaving_at_once():
        argv = list(sys.argv if argv is None else argv)
        rest = _parse(argv, required, takes_command, fields)
        _run(main, rest, several, takes_command)
    sys.exit(0)


@contextlib.contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the process where it is: what has anything to save hears it in our place.

    An exception would not do: imports of compiled modules, which take seconds, swallow it.
    """

    def leave(signum, frame) -> None:
        os.write(2, f"{_PROGRAM}: stopped by Ctrl-C\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # A shell in the background has it ignored.
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _nobody_reads() -> None:
    """Leaves nothing in the output's buffer that Python would complain about at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(
    argv: list[str], required: Sequence[str], takes_command: bool, fields: str
) -> Sequence[str]:
    """Parses the command line: what is left of it once flags are taken."""
    with_config = "config" in FLAGS
    app.define_help_flags()
    if not takes_command:
        _define_process_flags()
    try:
        argv = FLAGS.read_flags_from_files(argv, force_gnu=False)
        if with_config:
            argv = config_flag.of_method(config_flag.last_of_each(_help_last(argv)))
        rest = FLAGS(argv, known_only=False)
        missing = [
            f"--{name}" for name in required if not FLAGS[name].present or FLAGS[name].value == ""
        ]
        if missing:
            raise flags.Error(f"{' and '.join(missing)} must be given")
        if len(rest) > 1 and not takes_command:
            raise flags.Error(f"unexpected argument {rest[1]!r}; accepted: flags, see --help")
        if with_config:
            FLAGS.config.keys()  # A file that could not be loaded says so when it is first used.
    except SystemExit:  # Help was asked for and printed.
        try:
            if with_config and fields:
                print(config_flag.help_of_fields(argv, fields, FLAGS["config"].value))
            sys.stdout.flush()
        except BrokenPipeError:
            _nobody_reads()
        sys.exit(0)
    except BrokenPipeError:  # Of ``--help | head``, which has read enough.
        _nobody_reads()
        sys.exit(0)
    except Exception as error:  # Config files are the user's programs: they may raise anything.
        fail(config_flag.sentence(argv, error, fields) if with_config else one_line(error), 2)
    return rest


def _help_last(argv: Sequence[str]) -> list[str]:
    """Help ends the parsing where it stands; what stands after it counts too."""
    asking = {"help", "h", "?", "helpshort", "helpfull", "helpxml"}
    return sorted(
        argv, key=lambda argument: argument.startswith("-") and argument.lstrip("-") in asking
    )


def _run(
    main: Callable[..., object], rest: Sequence[str], several: bool, takes_command: bool
) -> None:
    """Runs ``main`` once the command line is parsed, and answers what it raises."""
    from jkmeans.processes import heartbeat, spare

    if takes_command:
        # Processes that are started again find the smallest program compiled.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    _keep_compiled_programs()
    if not takes_command:
        spare.wait_for_place()
        heartbeat.start()
    # Imported here, so that a wrong flag is answered at once.
    from jkmeans.errors import CollapseError, LostError, UserError
    from jkmeans.interruption import Interrupted
    from jkmeans.processes import agreement, joining

    try:
        if takes_command:
            sys.exit(int(main(rest[1:])))  # type: ignore[call-overload]
        _join(several)
        main()
        joining.leave()
        heartbeat.end()
    except (UserError, CollapseError, Interrupted, LostError) as error:
        fail(str(error), error.exit_status)
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EISDIR,
            errno.ENOTDIR,
        )  # fmt: skip
        if full and isinstance(error, OSError):
            where = error.filename or "a file of the run"
            fail(f"cannot write {where}: {error.strerror}; what was saved before is whole", 2)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            fail(
                f"there is not so much memory ({one_line(error)}); accepted: less of what the "
                "config asks for (rows, widths, batches), or more devices; what was saved before "
                "is whole",
                2,
            )
        if agreement.is_loss(error):
            fail(agreement.loss_sentence(error), LostError.exit_status)
        if agreement.count() > 1:
            traceback.print_exc()
            joining.end_at_once(1)
        raise


def _define_process_flags() -> None:
    if "processes" in FLAGS:
        return
    flags.DEFINE_integer(
        "processes",
        0,
        "Processes that compute as one, this one included; each is started with the same command. "
        "0: as SLURM, Open MPI, Kubernetes or experiments.launch say; 1: this one alone.",
        lower_bound=0,
    )
    flags.DEFINE_integer("process_id", -1, "Number of this process, from 0; −1: as they say.")
    flags.DEFINE_string("coordinator", "", "host:port of process 0; as they say if empty.")
    flags.DEFINE_integer(
        "join_seconds", 300, "How long processes wait for each other at the start.", lower_bound=1,
        upper_bound=_MOST_SECONDS,
    )  # fmt: skip
    flags.DEFINE_integer(
        "lost_seconds", 30, "A process that is not heard of for so long is dead.", lower_bound=5,
        upper_bound=_MOST_SECONDS,
    )  # fmt: skip
    flags.DEFINE_integer(
        "stuck_seconds", 1800, "A collective that takes longer has failed (CPU).", lower_bound=5,
        upper_bound=_MOST_SECONDS,
    )  # fmt: skip


def _join(several: bool) -> None:
    """Joins the other processes, if there are any."""
    from jkmeans.errors import UserError
    from jkmeans.processes import joining

    place = joining.find_place(FLAGS.processes, FLAGS.process_id, FLAGS.coordinator)
    if place is None:
        return
    if not several:
        raise UserError(
            f"this is process {place.number} of {place.count}, but what it runs works in one "
            "process only; accepted: --processes=1"
        )
    joining.prepare_environment(FLAGS.stuck_seconds)
    joining.join(
        place,
        _given(),
        join_seconds=FLAGS.join_seconds,
        lost_seconds=FLAGS.lost_seconds,
    )


def _given() -> dict[str, object]:
    """What the command line says, by name: all processes must have been given the same."""
    given: dict[str, object] = {"the program": os.path.basename(sys.argv[0])}
    for name, flag in _own_flags():
        if name == "config" and flag.value is not None:
            given |= _flat("config", flag.value.to_dict())
        elif name not in _OF_PROCESSES:
            given[f"--{name}"] = flag.value
    return given


def _own_flags() -> list[tuple[str, flags.Flag]]:
    """The flags of the launcher, without those of libraries."""
    by_module = FLAGS.flags_by_module_dict()
    ours = [flag for name, found in by_module.items() if "absl" not in name for flag in found]
    return sorted({flag.name: flag for flag in ours if "." not in flag.name}.items())


def _flat(prefix: str, values: dict) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        deeper = isinstance(value, dict)
        flat |= _flat(f"{prefix}.{name}", value) if deeper else {f"{prefix}.{name}": value}
    return flat


def _keep_compiled_programs() -> None:
    """Programs that were compiled once are read from a folder the next time."""
    from jkmeans.named_data import cache_folder  # Not JAX, which reads these when it is imported.

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def fail(sentence: str, status: int) -> None:
    """Prints one sentence on stderr and exits with ``status``."""
    sys.stdout.flush()
    print(f"{_PROGRAM}: {sentence}", file=sys.stderr, flush=True)
    from jkmeans.processes import joining

    joining.end_at_once(status)
    sys.exit(status)
