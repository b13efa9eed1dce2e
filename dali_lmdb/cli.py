"""The command ``dali-lmdb``, and what all commands share: our errors and Ctrl-C become a line and an exit code."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from tqdm import tqdm

from dali_lmdb.errors import DaliLmdbError, one_line

__all__ = ["Command", "ProgressBar", "main"]

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


class Command(click.Command):
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
            except BrokenPipeError:  # the reader of our output went away, as `head` does
                sys.exit(1)


class ProgressBar:
    """Rate and time left of work on records: a bar on a terminal, else a plain line now and then; on stderr.

    Args:
        quiet: no plain lines.
        unit: what is counted, in the plural.
    """

    def __init__(self, *, quiet: bool = False, unit: str = "images") -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._terminal = sys.stderr.isatty()
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
        click.echo(f"{phase}: {done:,} of {total:,} {self._unit}, {rate:,.0f} MB/s", err=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Commands(click.Group):
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
