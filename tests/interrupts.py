"""Interrupt loops over a loader, and closing it; `python interrupts.py KIND STORE COUNT SEED` prints JSON.

``raised`` interrupts come in bursts at random moments, some while an earlier one is handled, and end the loop or
the closing ``ended`` times. After a ``lost`` one the loop went on. An epoch handed ``repeated`` records out twice.
"""

import _weakrefset
import faulthandler
import json
import random
import signal
import sys
import time
import weakref
from collections import Counter

from dali_lmdb import DaliLoader, TorchLoader, TrainTransform

# Not with workers: an interrupt in multiprocessing's fork leaves locks of Python's own library held.
KINDS = {
    "dali": (DaliLoader, {"device": "cpu", "num_threads": 1}),
    "torch": (TorchLoader, {"num_workers": 0}),
}
_FINALIZERS = (weakref.__file__, _weakrefset.__file__)
MOST_SECONDS = 60  # without an interrupt: then something waits for ever


class Alarm:
    """Raises KeyboardInterrupt at random moments inside of ``Loop.run``, whose caller counts them.

    Not in destructors and finalizers, from which Python lets no exception out: there it comes a little later.
    """

    def __init__(self, rng):
        self.rng, self.raised, self.left = rng, 0, 0
        signal.signal(signal.SIGALRM, self._interrupt)

    def start(self):
        """Begin a burst, unless one is under way."""
        if not self.left:
            self.left = self.rng.choice((1, 1, 2, 4))
            self._set(self.rng.random() * 0.012)

    def _set(self, seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds + 1e-5)

    def _interrupt(self, number, frame):
        while frame is not None and frame.f_code is not Loop.run.__code__:
            code = frame.f_code
            is_destructor = code.co_name == "__del__" or code.co_filename in _FINALIZERS
            is_interrupt = code is Alarm._interrupt.__code__  # which has not raised yet
            frame = None if is_destructor or is_interrupt else frame.f_back
        if frame is None:
            self._set(1e-4)
            return
        self.raised += 1
        self.left -= 1
        if self.left:
            self._set(self.rng.random() ** 3 * 0.002)
        raise KeyboardInterrupt


class Loop:
    """A loop over a loader that goes on after an interrupt."""

    def __init__(self, kind, path, alarm):
        make, options = KINDS[kind]
        self.loader = make(
            path,
            transform=TrainTransform(size=8),
            batch_size=4,
            rank=0,
            world_size=1,
            return_index=True,
            **options,
        )
        self.alarm, self.steps, self.seen = alarm, iter(self.loader), set()
        self.raised_before = alarm.raised
        self.lost = self.repeated = 0

    def run(self, closing):
        """Take batches, or close the loader, until interrupted; an interrupt that is lost ends it, too."""
        while not closing:
            for _, _, records in self.steps:
                if self.alarm.raised > self.raised_before:
                    self.lost += self.alarm.raised - self.raised_before
                    return
                shown = {(self.loader.epoch, record) for record in records.tolist()}
                self.repeated += len(self.seen & shown)
                self.seen |= shown
            self.steps = iter(self.loader)
        self.loader.close()


def is_interrupt(error):
    """Whether an exception is an interrupt, or one that an interrupt has caused in Python's own library."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or is_interrupt(error.__context__))


def main(kind, path, count, seed):
    rng = random.Random(seed)
    alarm = Alarm(rng)
    loop, figures, begin = Loop(kind, path, alarm), Counter(), time.monotonic()
    while alarm.raised < count:
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        closing = rng.random() < 0.02
        alarm.start()
        try:
            loop.run(closing)
        except BaseException as error:
            if not is_interrupt(error):
                raise
            figures["ended"] += 1
        loop.raised_before = alarm.raised
        if closing:
            loop.loader.close()  # whatever state an interrupt has left it in
            figures.update(closed=1, lost=loop.lost, repeated=loop.repeated)
            loop = Loop(kind, path, alarm)
        elif rng.random() < 0.2:
            loop.steps = iter(loop.loader)  # else it goes on with the step that was interrupted
            loop.seen.clear()
    signal.setitimer(signal.ITIMER_REAL, 0)
    loop.loader.close()
    figures.update(raised=alarm.raised, lost=loop.lost, repeated=loop.repeated)
    print(json.dumps(figures | {"s": round(time.monotonic() - begin, 1)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
