"""The command ``dali-lmdb``, and what all commands share.

Our errors, Ctrl-C and an output that cannot be written become one line and an exit code. Standard streams may be
closed, as daemons start commands: that is the same as /dev/null.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click
from tqdm import tqdm

from dali_lmdb.errors import DaliLmdbError, one_line
from dali_lmdb.torchrun import RanksT, ignored_variables

__all__ = ["Command", "ProgressBar", "main", "print_progress", "print_result", "ranks_from_environment"]

_COMMANDS = {
    "compare": "dali_lmdb.compare.__main__:main",
    "convert": "dali_lmdb.convert.__main__:main",
    "export": "dali_lmdb.inspect.__main__:export_command",
    "info": "dali_lmdb.inspect.__main__:info_command",
    "train": "dali_lmdb.train.__main__:main",
    "verify": "dali_lmdb.inspect.__main__:verify_command",
}
_LINE_EVERY_S = 10  # between lines of progress where there is no terminal
_INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


@contextmanager
def _stopping() -> Iterator[None]:
    """Turn KeyboardInterrupt into its message, if it has one, and exit code 130; click would say 1."""
    try:
        yield
    except KeyboardInterrupt as stop:
        click.echo(str(stop) or "Stopped.", err=True)
        sys.exit(_INTERRUPTED)


class _StandardStreams(click.Command):
    """A command that runs with any standard streams, and says in one line that it cannot write to stdout."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # its descriptor was closed when Python started
                setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _stdout_errors():  # prints --help and --version
            return super().make_context(*args, **kwargs)


class Command(_StandardStreams):
    """A command whose ``DaliLmdbError`` and ``ValueError`` become ``Error: ...`` and exit code 1.

    ``ValueError`` is what the library raises for arguments that do not fit together or do not fit the data.
    ``KeyboardInterrupt`` becomes exit code 130 and its message; ``Stopped.`` if it has none.
    """

    def invoke(self, ctx: click.Context) -> Any:
        with _stopping():
            try:
                return super().invoke(ctx)
            except (DaliLmdbError, ValueError) as error:
                raise click.ClickException(one_line(str(error))) from error
            except BrokenPipeError:  # the reader of our progress went away
                sys.exit(1)


def ranks_from_environment(kind: type[RanksT]) -> RanksT | None:
    """Call ``kind.from_environment()``, and print a note to stderr where that ignores a WORLD_SIZE."""
    ranks = kind.from_environment()
    ignored = ignored_variables()
    if ignored is not None:
        print_progress(f"note: {ignored}")
    return ranks


def print_result(text: str, *, done: str | None = None) -> None:
    """Print a command's result to stdout.

    Args:
        done: what has been made all the same, for the message if ``text`` cannot be written.
    """
    with _stdout_errors("" if done is None else f"; {done} is complete"):
        click.echo(text)


def print_progress(text: str) -> None:
    """Print a line to stderr; work goes on if it cannot be written, unless its reader went away."""
    try:
        click.echo(text, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        _discard_output(sys.stderr)


@contextmanager
def _stdout_errors(note: str = "") -> Iterator[None]:
    """Turn an error in writing to stdout into one line; without a word if its reader went away, as `head` does."""
    try:
        yield
    except OSError as error:
        _discard_output(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise click.ClickException(f"standard output: cannot be written: {error.strerror}{note}") from error


def _discard_output(stream: TextIO) -> None:
    """Send what a stream could not write, and what follows, to /dev/null: Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class ProgressBar:
    """Rate and time left of work on records: a bar on a terminal, else a plain line now and then; on stderr.

    Args:
        quiet: no plain lines.
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
        """Say how far it is.

        Args:
            phase: what is being done; another one begins another bar.
            done, total: number of images or the like; a total of 0 is not known.
            num_bytes: done since the beginning.
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
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        rate = num_bytes / 1e6 / (now - self._begin)
        print_progress(f"{phase}: {done:,} of {total:,} {self._unit}, {rate:,.0f} MB/s")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Commands(_StandardStreams, click.Group):
    """Imports a command when it is asked for: converting needs no torch, training no converter."""

    def invoke(self, ctx: click.Context) -> Any:
        with _stopping():  # while a command is imported, too
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dali-lmdb")
def main() -> None:
    """JPEG data sets in one LMDB file, fed to PyTorch training through NVIDIA DALI."""
