"""Work on untrusted bytes in a process of its own: a crash, hang or growth is told with the item that caused it.

Decoders are native code; on damaged files they may corrupt memory. So they work in a process that can be lost.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from dali_lmdb import errors

__all__ = ["CPU_SECONDS", "GROWTH_BYTES", "Answer", "Died", "Isolated", "Sample"]

CPU_SECONDS = 30
"""Limit of CPU time for one item; the largest images of the slowest formats (JPEG 2000, AVIF) take some 10 s."""
GROWTH_BYTES = 3 << 30
"""Limit of the address space that a process may add to what it had before its first item."""

_WALL_FACTOR = 10  # limit of elapsed time as a multiple of CPU_SECONDS; only for waiting, since cores may be busy
_HEADER_BYTES = 64  # of the shared memory: the number of the item being worked on, or -1
_FIRST_BYTES = 8 << 20  # of the shared memory; it grows
_MOST_BYTES = 64 << 20  # of the shared memory of a process that is kept for the next items
_PAGE = mmap.PAGESIZE
_OUT_OF_MEMORY = 77  # exit code
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)

# sys.path comes with the first message, so that the process finds this very package.
_BOOT = """
import pickle, sys
from multiprocessing.connection import Connection
parent = Connection(int(sys.argv[1]))
sys.path[:] = pickle.loads(parent.recv_bytes())
from dali_lmdb.isolated import serve
serve(parent, int(sys.argv[2]))
"""


class Sample(NamedTuple):
    """An item to work on."""

    data: Any
    """Bytes, or any buffer of them."""
    note: Any = None
    """What belongs to it; JSON must be able to hold it."""


class Answer(NamedTuple):
    """What the handler made of an item."""

    value: Any
    """As from JSON: tuples are lists."""
    data: bytes | None = None


class Died(NamedTuple):
    """The item ended the process."""

    cause: str
    """Such as ``"crashed: SIGSEGV"``."""


Handler = Callable[[Sequence[Sample], Callable[[int | None], None]], Sequence[Answer]]
"""Given the items, whose data are memoryviews, and ``begin``, returns an answer for each.

``begin(i)`` must be called before working on item i, ``begin(None)`` before working on several at once: each call
gives it ``cpu_seconds``, and tells whose fault a crash is.
"""


class Isolated:
    """A process that works on items; it starts when it is first needed, and again after it has died.

    Not for use by several threads at once, except ``close``. The process ends when it is interrupted, and, after
    its item, when its parent ends.

    Args:
        handler: ``"module:function"``; the process calls ``function(settings)`` once, for its ``Handler``.
        settings: anything that can be pickled.
        cpu_seconds: limit of CPU time for each item, or for several at once. Of elapsed time, ten times that.
        growth_bytes: as ``GROWTH_BYTES``.
    """

    def __init__(
        self, handler: str, settings: object, *, cpu_seconds: int = CPU_SECONDS, growth_bytes: int = GROWTH_BYTES
    ) -> None:
        self._first = pickle.dumps((handler, settings, cpu_seconds, growth_bytes))
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory: _SharedMemory | None = None
        self._is_ready = self._has_answered = False  # this process
        self._closed = False
        self._starting = threading.Lock()  # so that close() does not miss a process that is being started

    def work(self, items: Sequence[Sample]) -> list[Answer | Died]:
        """The handler's answers, in order; ``Died`` for an item that ends the process, by itself or among others.

        Raises:
            DaliLmdbError, RuntimeError: the handler raised it, or the process was closed.
            DeviceError: the process dies while it starts.
            ImportError, MemoryError: the handler cannot be made.
            OSError: there is no memory for the items, or not as much as the limit on the size of files.
        """
        try:
            answers: list[Answer | Died] = list(self._ask(items))
            if self._memory is not None and self._memory.num_bytes > _MOST_BYTES:
                self.end()
            return answers
        except _DiedError as error:
            if len(items) == 1 and (error.timed_out or not error.had_answered):
                return [Died(error.cause)]
            guilty, cause, timed_out = error.item, error.cause, error.timed_out
        except Exception:
            raise
        except BaseException:  # an interrupt: the answer that comes now would be taken for the next one's
            self.end()
            raise
        if len(items) == 1:  # perhaps what came before it has damaged the process's memory
            return self.work(items)
        if guilty is None:  # while it worked on several
            middle = len(items) // 2
            return self.work(items[:middle]) + self.work(items[middle:])
        verdict: Answer | Died = Died(cause)
        if not timed_out:
            (verdict,) = self.work(items[guilty : guilty + 1])
        if isinstance(verdict, Died):
            return [*self._work_if_any(items[:guilty]), verdict, *self._work_if_any(items[guilty + 1 :])]
        # One before it has damaged the process's memory: each gets a process of its own.
        answers = []
        for item in items:
            self.end()
            answers += self.work([item])
        self.end()
        return answers

    def _work_if_any(self, items: Sequence[Sample]) -> list[Answer | Died]:
        return self.work(items) if items else []

    def close(self) -> None:
        """End the process at once; a thread that waits for its answer gets an error."""
        self._closed = True
        with self._starting:
            process = self._process  # read once: another thread may be ending it
            if process is not None:
                process.kill()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        self.end()

    def _ask(self, items: Sequence[Sample]) -> list[Answer]:
        connection, memory = self._wait_until_ready()
        places = memory.write([item.data for item in items])
        request = [(*place, item.note) for place, item in zip(places, items, strict=True)]
        try:
            connection.send_bytes(json.dumps(request).encode())
            reply = json.loads(connection.recv_bytes())
            if "raised" not in reply:
                answers = [
                    Answer(value, connection.recv_bytes() if has_data else None)
                    for value, has_data in reply["answers"]
                ]
                self._has_answered = True
                return answers
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            raise self._death(memory, len(items)) from error
        raise _raised(*reply["raised"])

    def start(self) -> None:
        """Start the process if it does not run, without waiting until it is ready: it imports what it needs."""
        if self._connection is not None:
            return
        ours, theirs = socket.socketpair()
        memory = _SharedMemory(os.memfd_create("dali_lmdb items"))
        with theirs, self._starting:
            if self._closed:
                ours.close()
                raise RuntimeError("the process that decodes is closed")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(memory.descriptor)],
                pass_fds=(theirs.fileno(), memory.descriptor),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries write to it about each damaged image
                # NumPy's BLAS would start a thread that spins at first: a sixth of the time to start.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, which then ends this process
            )
        connection = Connection(ours.detach())
        self._connection, self._memory = connection, memory
        self._is_ready = self._has_answered = False
        with contextlib.suppress(OSError):  # it has died: that is told where its reply is awaited
            connection.send_bytes(pickle.dumps(sys.path))
            connection.send_bytes(self._first)

    def _wait_until_ready(self) -> tuple[Connection, _SharedMemory]:
        self.start()
        connection, memory = self._connection, self._memory
        assert connection is not None
        assert memory is not None
        if self._is_ready:
            return connection, memory
        try:
            reply = json.loads(connection.recv_bytes())
        except (OSError, EOFError, ValueError) as error:
            died = self._death(memory, 0)
            raise errors.DeviceError(
                f"the process that decodes cannot start: it {died.cause}; free some memory, or raise the limits "
                "of this process (ulimit -a)"
            ) from error
        if reply is not None:
            self.end()
            raise _raised(*reply["raised"])
        self._is_ready = True
        return connection, memory

    def _death(self, memory: _SharedMemory, num_items: int) -> _DiedError:
        """Why and with which item the process died."""
        process, item = self._process, memory.current()
        assert process is not None
        if process.poll() is None:  # what it sent makes no sense, or it is about to end
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
        code = process.wait()
        self.end()
        if self._closed:
            raise RuntimeError("the process that decodes is closed")
        timed_out = code in (-signal.SIGPROF, -signal.SIGALRM)
        return _DiedError(
            self._cause(code),
            item if 0 <= item < num_items else None,
            timed_out=timed_out,
            had_answered=self._has_answered,
        )

    def _cause(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"took more than {self._cpu_seconds} s"
        if code == -signal.SIGALRM:
            return f"took more than {self._cpu_seconds * _WALL_FACTOR} s"
        if code == -signal.SIGKILL:
            return "was killed: SIGKILL, perhaps for lack of memory"
        if code < 0:
            name = signal.Signals(-code).name
            return f"crashed: {name}" if -code in _CRASHES else f"was killed: {name}"
        return "ran out of memory" if code == _OUT_OF_MEMORY else f"ended with exit code {code}"

    def end(self) -> None:
        """End the process and its memory; the next items get a new one."""
        process, connection, memory = self._process, self._connection, self._memory
        self._process = self._connection = self._memory = None
        if process is not None:
            process.kill()
            process.wait()
        if connection is not None:
            connection.close()
        if memory is not None:
            memory.close()


class _DiedError(Exception):
    def __init__(self, cause: str, item: int | None, *, timed_out: bool, had_answered: bool) -> None:
        super().__init__(cause)
        self.cause, self.item, self.timed_out, self.had_answered = cause, item, timed_out, had_answered


_OF_LITTLE_MEMORY: dict[str, type[Exception]] = {"ImportError": ImportError, "MemoryError": MemoryError}


def _raised(kind: str, message: str) -> Exception:
    """An exception of the handler, made again."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.DaliLmdbError):
        return known(message)
    return _OF_LITTLE_MEMORY.get(kind, RuntimeError)(message)


class _SharedMemory:
    """Memory of an unnamed file that parent and child map: a header, then the items' bytes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._map: mmap.mmap | None = None

    def map(self, num_bytes: int) -> mmap.mmap:
        """The memory, with room for so many bytes of items."""
        needed = _HEADER_BYTES + num_bytes
        if self._map is None or len(self._map) < needed:
            size = max(_FIRST_BYTES, -(-needed // _PAGE) * _PAGE)
            if os.fstat(self.descriptor).st_size < size:
                os.ftruncate(self.descriptor, size)
            self._map = mmap.mmap(self.descriptor, size)
        return self._map

    @property
    def num_bytes(self) -> int:
        return 0 if self._map is None else len(self._map)

    def write(self, values: Sequence[Any]) -> list[tuple[int, int]]:
        """Put the items there; return (begin, length) of each."""
        lengths = [memoryview(value).nbytes for value in values]
        memory = self.map(sum(lengths))
        self.set_current(-1)
        places, begin = [], _HEADER_BYTES
        for value, length in zip(values, lengths, strict=True):
            memory[begin : begin + length] = value if isinstance(value, bytes) else memoryview(value).cast("B")
            places.append((begin, length))
            begin += length
        return places

    def current(self) -> int:
        """The number of the item that the child works on; -1 for none or several."""
        return -1 if self._map is None else int.from_bytes(self._map[:8], "little", signed=True)

    def set_current(self, item: int) -> None:
        self.map(0)[:8] = item.to_bytes(8, "little", signed=True)

    def close(self) -> None:
        self._close()
        self._map = None  # not closed: views of it may exist


# In the process


def serve(parent: Connection, descriptor: int) -> None:
    """Answer the parent until it closes the connection."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name, settings, cpu_seconds, growth_bytes = pickle.loads(parent.recv_bytes())
    memory = _SharedMemory(descriptor)
    try:
        module, _, function = name.partition(":")
        handler: Handler = getattr(importlib.import_module(module), function)(settings)
    except Exception as error:
        _send(parent, _as_reply(error))
        return
    _limit_growth(growth_bytes)
    _send(parent, None)

    def begin(item: int | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, cpu_seconds * _WALL_FACTOR)
        memory.set_current(-1 if item is None else item)

    while True:
        try:
            request = json.loads(parent.recv_bytes())
        except (EOFError, OSError):
            return
        end = max(start + length for start, length, _ in request)
        try:
            view = memoryview(memory.map(end - _HEADER_BYTES))
        except OSError:
            os._exit(_OUT_OF_MEMORY)
        items = [Sample(view[start : start + length], note) for start, length, note in request]
        try:
            answers = handler(items, begin)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)  # the parent finds the item as it does after a crash
        except Exception as error:
            _send(parent, _as_reply(error))
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        _send(parent, {"answers": [(answer.value, answer.data is not None) for answer in answers]})
        for answer in answers:
            if answer.data is not None:
                parent.send_bytes(answer.data)


def _send(parent: Connection, reply: Any) -> None:
    parent.send_bytes(json.dumps(reply).encode())


def _as_reply(error: Exception) -> dict[str, list[str]]:
    kind = type(error).__name__
    return {"raised": [kind, str(error) or kind]}


def _limit_growth(growth_bytes: int) -> None:
    """Let the address space grow by so much; beyond it, allocations fail."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * _PAGE
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + growth_bytes
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
