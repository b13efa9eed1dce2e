"""What the tests of conversions share: running, interrupting and comparing them."""

import os
import signal
import sys
import traceback
from functools import partial

import lmdb
import pytest
from click.testing import CliRunner

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.convert import _job as job
from dali_lmdb.convert.__main__ import main
from dali_lmdb.convert._journal import Journal
from dali_lmdb.convert.sources import FolderSource
from dali_lmdb.errors import ConversionError
from dali_lmdb.store import layout, open_store
from dali_lmdb.store.writer import StoreWriter

SKIP_BAD = ConvertSettings(on_bad="skip")


def write_with(monkeypatch, **arguments):
    """Let conversions make their ``StoreWriter`` with these arguments."""
    monkeypatch.setattr(job, "StoreWriter", partial(StoreWriter, **arguments))


def left_beside(target):
    return sorted(path.name for path in target.parent.iterdir())


def content(path):
    """All that two conversions of the same source have in common."""
    with open_store(path) as store:
        columns = ("label", "height", "width", "num_bytes", "crc32", "kind", "change")
        return (
            [bytes(store.read(i)) for i in range(len(store))],
            [store.name(i) for i in range(len(store))],
            store.classes,
            store.fingerprint,
            {name: store.column(name).tolist() for name in columns},
        )


def refusal(source, target, error=ConversionError, **options):
    with pytest.raises(error) as info:
        convert(source, target, **options)
    message = str(info.value)
    assert "\n" not in message
    return message


def add_bad(images):
    """Three files that are no images, first, middle and last; returns their names."""
    (images / "ant" / "!.jpg").write_text("hello\tthere")
    (images / "bee" / "zero.jpg").touch()
    (images / "cat" / "~.jpg").write_bytes((images / "cat" / "020.jpg").read_bytes()[:100])
    return ["ant/!.jpg", "bee/zero.jpg", "cat/~.jpg"]


def report_of(target):
    lines = target.with_name(target.name + ".bad.tsv").read_text().splitlines()
    assert lines[0] == "name\treason"
    rows = [line.split("\t") for line in lines[1:]]
    assert all(len(row) == 2 and row[1] for row in rows)
    return [name for name, _ in rows]


class CountedSource(FolderSource):
    """Remembers which images were read."""

    def __init__(self, path):
        super().__init__(path)
        self.read = []

    def items(self):
        for item in super().items():
            yield item._replace(read=lambda item=item: (self.read.append(item.name), item.read())[1])


class Killer:
    """Kills its process at the n-th of the instants that matter."""

    def __init__(self, at):
        self.left = at

    def tick(self):
        self.left -= 1
        if self.left < 0:
            die()

    def wrap(self, owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.tick()
            result = original(*args, **kwargs)
            self.tick()
            return result

        setattr(owner, name, wrapped)

    def arm(self):
        for owner, name in [
            (os, "fsync"),
            (os, "rename"),
            (StoreWriter, "__init__"),
            (StoreWriter, "commit"),
            (StoreWriter, "add_index"),
            (StoreWriter, "finish"),
            (Journal, "__init__"),
            (Journal, "start"),
            (Journal, "append"),
            (Journal, "cut_to"),
            (Journal, "_write"),
            (Journal, "_cut"),
        ]:
            self.wrap(owner, name)
        sys.addaudithook(
            lambda event, args: self.tick() if event in ("open", "os.remove", "os.truncate") else None
        )


def in_child(work):
    """Run ``work()`` in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def records_in(partial):
    if not partial.exists() or partial.stat().st_size == 0:
        return 0
    with lmdb.open(str(partial), subdir=False, lock=False, readonly=True) as env, env.begin() as transaction:
        return sum(key < layout.RESERVED_KEY for key in transaction.cursor().iternext(values=False))


def run_main(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr
