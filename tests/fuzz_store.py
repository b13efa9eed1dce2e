"""Damage a store in many ways; `python fuzz_store.py STORE FOLDER CASES` prints what came of it as JSON.

A case may end in a result or in one of the package's errors. Anything else is printed as a failure, and so is
a store that cannot be read, or reads differently, although `verify` finds nothing wrong with it.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

from dali_lmdb.errors import DaliLmdbError
from dali_lmdb.inspect import info, verify
from dali_lmdb.store import layout, open_store
from dali_lmdb.store.pages import PageFile


def contents(path):
    """All that a user reads from a store's records."""
    with open_store(path) as store:
        records = [
            (int(store.labels[i]), store.name(i), bytes(store.read(i)), int(store.column("height")[i]))
            for i in range(len(store))
        ]
        return store.classes, records


def structure_bytes(path):
    """Places of what is not the records' bytes: meta pages, tree pages, index, names, meta."""
    pages = PageFile(path)
    data = bytes(pages.data)
    tree = [n for n in range(2, pages.last_page + 1) if data[n * pages.page_size + 10] & 3]
    places = [base + i for base in (0, pages.page_size) for i in range(152)]
    places += [n * pages.page_size + i for n in tree for i in range(pages.page_size)]
    pieces = range(len(open_store(path).meta.pieces()))
    for key in (layout.META_KEY, *map(layout.index_key, pieces), *map(layout.names_key, pieces)):
        offset, length = pages.find(key)
        places += range(offset - 16, offset + length)
    return places


def damaged(data, places, number):
    """The bytes of one case, and its name."""
    rng = random.Random(number)
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))], "truncated"
    changed = bytearray(data)
    anywhere = rng.random() < 0.3
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(len(data)) if anywhere else rng.choice(places)
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed), "flipped anywhere" if anywhere else "flipped in the structure"


def outcome(path, whole):
    """(what came of one damaged store, what should not have happened or None)."""
    answers, errors = [], []
    for function in (info, lambda path: verify(path, num_threads=1), contents):
        try:
            answers.append(function(path))
        except DaliLmdbError as error:
            if len(str(error).splitlines()) != 1:
                return "failed", f"not one line: {error!r}"
            answers.append(None)
            errors.append(error)
    _, verified, read = answers
    found = verified is None or not verified.clean
    if (errors or read != whole) and not found:
        return "failed", f"verify finds no damage, but it {errors or 'reads differently'}"
    return f"{'refused' if errors else 'read'}, {'' if found else 'not '}found by verify", None


def main(store, folder, cases):
    data, places, whole = Path(store).read_bytes(), structure_bytes(store), contents(store)
    outcomes, failures = Counter(), []
    for number in range(cases):
        # Each case is a file of its own: maps of earlier ones may still be alive.
        path = Path(folder) / f"case-{number}.lmdb"
        content, name = damaged(data, places, number)
        path.write_bytes(content)
        print(f"case {number}", file=sys.stderr, flush=True)  # the last line tells which case killed the process
        try:
            result, failure = outcome(path, whole)
        except Exception as error:
            result, failure = "failed", repr(error)
        outcomes[f"{name}: {result}"] += 1
        if failure:
            failures.append(f"case {number} ({name}): {failure}")
        path.unlink()
    print(json.dumps({"outcomes": outcomes, "failures": failures}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
