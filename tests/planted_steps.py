"""Steps for the tests of ``gpu_report.py``: one for each way to end."""

import os
import signal
import subprocess
import sys
import threading


def good(value=1):
    yield {"value": value}
    yield {"value": value + 1}


def wrong():
    yield {"value": 1}
    yield {"value": 2, "wrong": "2 is not 1"}


def failing():
    yield {"value": 1}
    raise ValueError("two\nlines")


def leaving():
    yield {"value": 1}
    sys.exit(7)


def crashing():
    yield {"value": 1}
    os.kill(os.getpid(), signal.SIGSEGV)


def crashing_at_its_end():
    yield {"value": 1}
    threading.Thread(target=lambda: (threading.main_thread().join(), os.kill(os.getpid(), signal.SIGSEGV))).start()


def hanging():
    yield {"value": 1}
    threading.Event().wait()


def leaving_a_process_behind():
    yield {"pid": subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid}
