"""Seeded damage to bytes, and a loop over cases that tells what came of each."""

import json
import random
import resource
import signal
import sys
from collections import Counter

from bounds import MAX_SECONDS, bounded

from dali_lmdb.errors import DaliLmdbError
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.store.payload import PayloadError

_OUR_ERRORS = (DaliLmdbError, BadImageError, PayloadError)
_MAX_ADDRESS_SPACE = 8 << 30  # a wild allocation fails, instead of filling the machine
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def damaged(data, rng, *, tokens=()):
    """A copy of some bytes with one to four changes: flips, cuts, insertions, moved parts, extreme numbers.

    Args:
        tokens: byte strings that mean something to the parser, to put anywhere.
    """
    data = bytearray(data)
    changes = [_flip, _flip, _number, _number, _cut, _remove, _insert, _swap, _repeat]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if tokens and rng.random() < 0.3:
            at = _place(data, rng)
            data[at : at + rng.choice((0, 1, 2, 4))] = rng.choice(tokens)
        else:
            rng.choice(changes)(data, rng)
    return bytes(data)


def _place(data, rng):
    """Anywhere, or among the first bytes, where headers are."""
    return rng.randrange(rng.choice((64, 1024, len(data))) + 1) % (len(data) + 1)


def _part(data, rng):
    start = _place(data, rng)
    return slice(start, start + rng.choice((1, 2, 4, 8, 50, 512, 4096)))


def _flip(data, rng):
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[_place(data, rng) % len(data)] ^= 1 << rng.randrange(8)


def _number(data, rng):
    size, at = rng.choice((1, 2, 4, 8)), _place(data, rng)
    value = rng.choice((*_EXTREMES, len(data), rng.getrandbits(64))) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _cut(data, rng):
    del data[_place(data, rng) :]


def _remove(data, rng):
    del data[_part(data, rng)]


def _insert(data, rng):
    at = _place(data, rng)
    data[at:at] = rng.choice((rng.randbytes(rng.choice((1, 4, 100))), bytes(rng.choice((1, 512)))))


def _swap(data, rng):
    first, second = _part(data, rng), _part(data, rng)
    data[first], data[second] = data[second], data[first]


def _repeat(data, rng):
    part = data[_part(data, rng)]
    at = _place(data, rng)
    data[at:at] = part * rng.choice((1, 1, 100))


def run(make_case, use, *, first, cases):
    """Print as JSON what came of the cases: results, our errors, and as failures anything else.

    Args:
        make_case: called with a ``random.Random``; returns the input.
        use: called with the input.
    """
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE, _MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outcomes, failures = Counter(), []
    for number in range(first, first + cases):
        case = make_case(random.Random(number))
        print(f"case {number}", file=sys.stderr, flush=True)  # the last line tells which case killed the process
        signal.alarm(3 * MAX_SECONDS)
        try:
            with bounded():
                outcome = _outcome(use, case)
        except Exception as error:
            failures.append(f"case {number}: {error!r:.300}")
            outcome = "failed"
        signal.alarm(0)
        outcomes[outcome] += 1
    print(json.dumps({"outcomes": outcomes, "failures": failures}))


def check_message(error):
    """Fail unless the message of an error is one line."""
    assert len(str(error).splitlines()) == 1, f"not one line: {error!r}"


def _outcome(use, case):
    try:
        use(case)
    except _OUR_ERRORS as error:
        check_message(error)
        return type(error).__name__
    return "read"
