"""Handlers for ``test_isolated``, which run in processes of their own: what an item says, they do."""

import os
import signal

from dali_lmdb.errors import RecordError
from dali_lmdb.isolated import Answer


def obey(settings):
    """A handler: ``double`` is answered, with the settings and the note; other items misbehave."""
    if settings == "broken":
        raise RuntimeError("cannot be made")
    if settings == "no memory":
        raise ImportError("x.so: failed to map segment from shared object")
    if settings == "dies":
        os._exit(3)

    def handle(items, begin):
        return [_one(bytes(item.data).decode(), number, item, begin) for number, item in enumerate(items)]

    def _one(order, number, item, begin):
        begin(number)
        if order == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        if order == "segv in company" and number > 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        if order == "spin":
            while True:
                pass
        if order == "grow":
            bytearray(300 << 20)
        if order == "raise":
            raise RecordError("this record")
        if order == "exit":
            os._exit(3)
        if order == "wait":
            signal.pause()
        return Answer([settings, item.note, os.getpid()], b"2" * len(item.data))

    return handle


def together(settings):
    """A handler that begins all items at once, and crashes on ``segv``."""

    def handle(items, begin):
        begin(None)
        if any(bytes(item.data) == b"segv" for item in items):
            os.kill(os.getpid(), signal.SIGSEGV)
        return [Answer(None) for _ in items]

    return handle
