"""Plants a decoder that crashes on an image with ``CRASH`` in it: for processes with this folder in PYTHONPATH."""

import os
import signal

from dali_lmdb.images import checking

_check_jpeg = checking.check_jpeg


def check_jpeg(data, kind):
    if b"CRASH" in bytes(data):
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"SPIN" in bytes(data):
        while True:
            pass
    _check_jpeg(data, kind)


checking.check_jpeg = check_jpeg
