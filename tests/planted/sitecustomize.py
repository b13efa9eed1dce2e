"""Plants a decoder that crashes on an image with ``CRASH`` in it: for processes with this folder in PYTHONPATH."""

import os
import signal

from dali_lmdb.images import checking

_check_decodes = checking.check_decodes


def check_decodes(data, kind):
    if b"CRASH" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"SPIN" in data:
        while True:
            pass
    _check_decodes(data, kind)


checking.check_decodes = check_decodes
