"""`qwen3vl-disagg`: one-off generation, serving, sizing, conversion, traces. `python -m qwen3vl_disagg` is the same.

Nothing heavy is imported before the arguments are known to be right, and nothing at all before Ctrl-C is quiet.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from qwen3vl_disagg.core.interrupt import EXIT_INTERRUPTED, leaving_at_once

if TYPE_CHECKING:
    from qwen3vl_disagg.options import GenerateOptions, ServeOptions


def main() -> NoReturn:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not have every character that a model has
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with leaving_at_once():
        options = _parse()
        from qwen3vl_disagg.core.environment import check_environment
        from qwen3vl_disagg.core.errors import DisaggError, report
        from qwen3vl_disagg.core.logs import start_logging

        start_logging()
    try:
        check_environment()
        sys.exit(_run(options))
    except DisaggError as error:
        sys.exit(report(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _parse() -> Any:
    """The options of the command that was given. SystemExit for --help and for what does not parse."""
    if sys.argv[1:] == ["--version"]:
        _version()
        sys.exit()
    import tyro

    from qwen3vl_disagg.options import OPTIONS_OF

    commands = OPTIONS_OF | {"faults": _faults, "version": _version}
    return tyro.extras.subcommand_cli_from_dict(commands, prog="qwen3vl-disagg", config=(tyro.conf.OmitArgPrefixes,))


def _run(options: Any) -> int:
    """Run the command; returns the exit status."""
    from qwen3vl_disagg.options import ConvertOptions, GenerateOptions, PlanOptions, ServeOptions, TraceOptions

    match options:
        case GenerateOptions():
            return _generate(options)
        case ServeOptions():
            with leaving_at_once():
                _say_import(options)
                from qwen3vl_disagg.launch.command import run_serve
            return run_serve(options, sys.argv[2:])
        case PlanOptions():
            with leaving_at_once():
                from qwen3vl_disagg.plan.command import run_plan
            return run_plan(options)
        case ConvertOptions():
            with leaving_at_once():
                from qwen3vl_disagg.checkpoint.convert import run_convert
            return run_convert(options)
        case TraceOptions():
            from qwen3vl_disagg.launch.trace import run_trace

            return run_trace(options)
    return 0


def _say_import(options: ServeOptions) -> None:
    """To who looks on; elsewhere what is wrong with the arguments stays the only line."""
    if sys.stderr.isatty() and not options.dry.dry_run:
        from qwen3vl_disagg.cluster.rendezvous import World
        from qwen3vl_disagg.core.logs import start_logging, use_log_format

        use_log_format(options.log_format)
        start_logging()
        World().progress().stage("check", "loading PyTorch, checking the arguments and the checkpoint")


def _generate(options: GenerateOptions) -> int:
    with leaving_at_once():
        from qwen3vl_disagg.generate import Generation

        generation = Generation(options)
    return generation.run()


def _faults() -> None:
    """List the points at which Q3VL_FAULT=point:nth:kill|stop|raise makes a rank fail."""
    from qwen3vl_disagg.core.faults import POINTS

    for name, about in POINTS.items():
        print(f"{name:22} {about}")


def _version() -> None:
    """Print the version."""
    from importlib.metadata import version

    print(version("qwen3vl-disagg"))


if __name__ == "__main__":
    main()
