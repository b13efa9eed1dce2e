"""The command ``dali-lmdb``, and what all commands share: our errors become one line and exit code 1."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from dali_lmdb.errors import DaliLmdbError

__all__ = ["Command", "main"]

_COMMANDS = {
    "compare": "dali_lmdb.compare.__main__",
    "convert": "dali_lmdb.convert.__main__",
    "train": "dali_lmdb.train.__main__",
}


class Command(click.Command):
    """A command whose ``DaliLmdbError`` and ``ValueError`` become ``Error: ...`` and exit code 1.

    ``ValueError`` is what the library raises for arguments that do not fit together or do not fit the data.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (DaliLmdbError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:  # the reader of our output went away, as `head` does
            sys.exit(1)


class _Commands(click.Group):
    """Imports a command when it is asked for: converting needs no torch, training no converter."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name]).main
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dali-lmdb")
def main() -> None:
    """JPEG data sets in one LMDB file, fed to PyTorch training through NVIDIA DALI."""
