"""The ``dali-lmdb`` command, and code shared by all commands.

Our errors, Ctrl-C and an unwritable stdout become one line and an exit code. Closed standard streams, with which
daemons may start commands, are treated as /dev/null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO, get_args, get_origin, get_type_hints

import click
from tqdm import tqdm

from dali_lmdb.disk import describe_lack
from dali_lmdb.errors import DaliLmdbError, one_line
from dali_lmdb.torchrun import RankEnvironment, ignored_variables

__all__ = [
    "LINE_INTERVAL_S",
    "Command",
    "FiniteRange",
    "ProgressBar",
    "interrupt_on_sigterm",
    "main",
    "option_of",
    "print_progress",
    "print_result",
    "ranks_from_environment",
]

_COMMANDS = {
    "compare": "dali_lmdb.compare.__main__:main",
    "convert": "dali_lmdb.convert.__main__:main",
    "doctor": "dali_lmdb.doctor.commands:doctor_command",
    "evaluate": "dali_lmdb.evaluate.__main__:main",
    "export": "dali_lmdb.inspect.commands:export_command",
    "info": "dali_lmdb.inspect.commands:info_command",
    "parity": "dali_lmdb.view.commands:parity_command",
    "preview": "dali_lmdb.view.commands:preview_command",
    "train": "dali_lmdb.train.__main__:main",
    "tune": "dali_lmdb.compare.commands:tune_command",
    "verify": "dali_lmdb.inspect.commands:verify_command",
}
LINE_INTERVAL_S = 10
"""Between progress lines if stderr is not a terminal."""

_INTERRUPTED = 130  # a shell's exit code for a command ended by Ctrl-C: 128 + SIGINT


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Turn KeyboardInterrupt into its message, if it has one, and exit code 130; click would exit with 1."""
    try:
        yield
    except KeyboardInterrupt as stop:
        click.echo(str(stop) or "Stopped.", err=True)
        sys.exit(_INTERRUPTED)


class _StandardStreams(click.Command):
    """A command with -h for help, that tolerates closed standard streams and reports an unwritable stdout."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # its descriptor was closed when Python started
                setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _stdout_errors():  # prints --help and --version
            return super().make_context(*args, help_option_names=["-h", "--help"], **kwargs)


class Command(_StandardStreams):
    """A command whose ``DaliLmdbError`` and ``ValueError`` become ``Error: ...`` and exit code 1.

    The library raises ``ValueError`` for arguments that do not fit together or do not fit the data.
    ``KeyboardInterrupt`` becomes exit code 130 and its message; ``Stopped.`` if it has none.
    """

    def invoke(self, ctx: click.Context) -> Any:
        with _exit_on_interrupt(), _lack_as_one_line():
            try:
                return super().invoke(ctx)
            except (DaliLmdbError, ValueError) as error:
                raise click.ClickException(one_line(str(error))) from error
            except BrokenPipeError:  # the reader of our progress is gone
                sys.exit(1)


@contextmanager
def _lack_as_one_line() -> Iterator[None]:
    """Turn a lack of memory, threads or files into our message; another error is a bug and keeps its traceback."""
    try:
        yield
    except Exception as error:
        lack = describe_lack(error)
        if lack is None:
            raise
        raise click.ClickException(lack) from error


_Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def option_of(*settings: type[Any]) -> Callable[..., _Decorator]:
    """Return a function like ``click.option`` that takes default and ``Literal`` choices from a dataclass field.

    A field that may be None shows no default: its help says what None means.

    Args:
        settings: the dataclasses; if several have a field, the last one takes precedence.
    """
    defaults = {field.name: field.default for kind in settings for field in dataclasses.fields(kind)}
    types = {name: hint for kind in settings for name, hint in get_type_hints(kind).items()}

    def option(
        name: str,
        *,
        help: str,
        type: click.ParamType[Any] | None = None,
        metavar: str | None = None,
        is_flag: bool | None = None,
    ) -> _Decorator:
        field = name.removeprefix("--").replace("-", "_")
        default = defaults[field]
        return click.option(
            name,
            default=default,
            show_default=default is not None and not isinstance(default, bool),
            type=type or (click.Choice(choices) if (choices := _choices(types[field])) else None),
            metavar=metavar,
            is_flag=is_flag,
            help=help,
        )

    return option


class FiniteRange(click.FloatRange):
    """Numbers within limits, without inf and nan, which click takes to be inside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; a usage error if it is none, or outside."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, or of one that may also be None; none for other types."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    return tuple(value for part in literals for value in get_args(part))


def interrupt_on_sigterm() -> None:
    """Treat SIGTERM like Ctrl-C in this process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def ranks_from_environment() -> RankEnvironment | None:
    """Call ``RankEnvironment.from_environment``, and print a note to stderr if that ignores a WORLD_SIZE."""
    ranks = RankEnvironment.from_environment()
    ignored = ignored_variables()
    if ignored is not None:
        print_progress(f"note: {ignored}")
    return ranks


def print_result(text: str, *, done: str | None = None) -> None:
    """Print a command's result to stdout.

    Args:
        done: the output that is complete, mentioned in the error if ``text`` cannot be written.
    """
    with _stdout_errors("" if done is None else f"; {done} is complete"):
        click.echo(text)


def print_progress(text: str) -> None:
    """Print a line to stderr, ignoring write errors other than a broken pipe."""
    try:
        click.echo(text, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        _discard_output(sys.stderr)


@contextmanager
def _stdout_errors(note: str = "") -> Iterator[None]:
    """Turn an error writing to stdout into one line; exit silently on a broken pipe, as after ``| head``."""
    try:
        yield
    except OSError as error:
        _discard_output(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise click.ClickException(f"standard output: cannot be written: {error.strerror}{note}") from error


def _discard_output(stream: TextIO) -> None:
    """Redirect a stream and its unwritten buffer to /dev/null: Python would retry the write at exit."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class ProgressBar:
    """Progress on stderr, with rate and time left: a bar on a terminal, otherwise a plain line every 10 seconds.

    Args:
        quiet: print no plain lines.
        unit: what is counted, in the plural.
    """

    def __init__(self, *, quiet: bool = False, unit: str = "images") -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._quiet = quiet and not self._terminal
        self._unit = unit
        self._begin = self._last = time.monotonic()

    def show(self, phase: str, done: int, total: int, num_bytes: int) -> None:
        """Report progress.

        Args:
            phase: the current activity; a new one starts a new bar.
            done, total: number of units done and expected; a total of 0 means unknown.
            num_bytes: number of bytes processed since the start.
        """
        if self._quiet:
            return
        phase = one_line(phase)
        if not self._terminal:
            self._line(phase, done, total, num_bytes)
            return
        if phase != self._phase:
            self.close()
            self._phase = phase
            self._bar = tqdm(total=total or None, desc=phase, unit=f" {self._unit}", unit_scale=True)
        assert self._bar is not None
        self._bar.update(done - self._bar.n)

    def _line(self, phase: str, done: int, total: int, num_bytes: int) -> None:
        now = time.monotonic()
        if now - self._last < LINE_INTERVAL_S:
            return
        self._last = now
        rate = num_bytes / 1e6 / (now - self._begin)
        print_progress(f"{phase}: {done:,} of {total:,} {self._unit}, {rate:,.0f} MB/s")

    def close(self) -> None:
        """Close the bar, leaving it on the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Commands(_StandardStreams, click.Group):
    """Imports a command only when it is used: converting needs no torch, training no converter."""

    def invoke(self, ctx: click.Context) -> Any:
        with _exit_on_interrupt():  # while a command is imported, too
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].split(":")
        with _lack_as_one_line():
            command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.command(cls=_Commands)
@click.version_option(package_name="dali-lmdb")
def main() -> None:
    """JPEG data sets in one LMDB file, fed to PyTorch training through NVIDIA DALI."""
