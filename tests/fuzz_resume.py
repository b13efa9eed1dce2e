"""Damage what a killed conversion left and resume it; `python fuzz_resume.py FOLDER CASES` prints JSON.

A resumed conversion must either be refused in one line, or publish a store that `verify` calls clean and that
holds what an undisturbed conversion writes. Anything else is printed as a failure: other content, a foreign
exception, a signal, or more than ``LIMIT_S``. Each case runs in a process of its own.
"""

import json
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from conversions import Killer, content, in_child
from image_sets import make_image_folder

from dali_lmdb.convert import _job, convert
from dali_lmdb.errors import DaliLmdbError
from dali_lmdb.inspect import verify
from dali_lmdb.store.writer import StoreWriter

LIMIT_S = 30
_LIMIT_BYTES = 8 << 30  # of address space
_INSTANTS = range(8, 140, 6)  # at which the conversion is killed


def killed_conversions(images, folder):
    """Folders with what conversions left that were killed at various instants."""
    for at in _INSTANTS:
        left = folder / f"killed-{at}"
        left.mkdir()

        def work(at=at, left=left):
            Killer(at).arm()
            convert(images, left / "x.lmdb", num_threads=1, commit_records=5)

        in_child(work)
        if any(path.suffix.startswith(".partial") for path in left.iterdir()):
            yield left


def _structure(data):
    """Places in an LMDB file's tree pages, meta pages and headers of overflow pages."""
    pages = [base for base in range(0, len(data), 4096) if data[base + 10 : base + 11] not in (b"", b"\0")]
    places = (base + i for base in pages for i in range(16 if data[base + 10] & 4 else 4096))
    return [place for place in places if place < len(data)]


def damage(path, rng):
    """Damage one file; return what was done."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(("flipped", "flipped", "flipped in the structure", "overwritten", "cut", "grown", "emptied"))
    if not data or kind == "emptied":
        data = bytearray(rng.choice((b"", bytes(len(data)))))
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "grown":
        data += rng.randbytes(rng.choice((1, 7, 4096, 100_000)))
    elif kind == "overwritten":
        start = rng.randrange(len(data))
        piece = rng.randrange(len(data))
        length = rng.choice((2, 8, 4096))
        data[start : start + length] = data[piece : piece + length]
    else:
        places = _structure(data) if kind == "flipped in the structure" else None
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            place = rng.choice(places) if places else rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return kind


def outcome(images, target, whole):
    """(what came of one resumed conversion, what should not have happened or None)."""
    try:
        convert(images, target, num_threads=1, commit_records=5)
    except DaliLmdbError as error:
        if len(str(error).splitlines()) != 1:
            return "failed", f"not one line: {error!r}"
        return "refused", None
    if not (found := verify(target, num_threads=1)).clean:
        return "failed", f"published a damaged store: {found.damage[:2]}"
    if content(target) != whole:
        return "failed", "published other content"
    return "resumed", None


def _in_limits(work, answer):
    """Run ``work()`` in a process of its own, which writes its result to the file ``answer``."""

    def limited():
        signal.alarm(LIMIT_S)
        resource.setrlimit(resource.RLIMIT_AS, (_LIMIT_BYTES, _LIMIT_BYTES))
        try:
            result = work()
        except BaseException as error:
            result = "failed", repr(error)
        answer.write_text(json.dumps(result))

    status = in_child(limited)
    return json.loads(answer.read_text()) if status == 0 else ("failed", f"wait status {status}")


def main(folder, cases):
    folder = Path(folder)
    images = make_image_folder(folder / "images", num_records=24)
    for path in sorted(images.rglob("*.jpg"))[::2]:  # too long for a leaf page
        path.write_bytes(path.read_bytes() + bytes(5000))
    _job.StoreWriter = partial(StoreWriter, piece_records=7)
    convert(images, folder / "whole.lmdb")
    whole = content(folder / "whole.lmdb")
    states = list(killed_conversions(images, folder))
    outcomes, failures = Counter(), []
    for number in range(cases):
        rng = random.Random(number)
        here = folder / f"case-{number}"
        shutil.copytree(rng.choice(states), here)
        damaged = rng.choice(sorted(path for path in here.iterdir() if ".partial" in path.name))
        name = f"{damaged.name.partition('.lmdb')[2]} {damage(damaged, rng)}"
        result, failure = _in_limits(lambda here=here: outcome(images, here / "x.lmdb", whole), folder / "answer")
        outcomes[f"{name}: {result}"] += 1
        if failure:
            failures.append(f"case {number} ({name}): {failure}")
        else:
            shutil.rmtree(here)
    print(json.dumps({"outcomes": outcomes, "failures": failures}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
