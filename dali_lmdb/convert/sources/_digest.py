"""Count and hash a source's names and find a repeated one, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from dali_lmdb.convert.sources._names import repeated_name
from dali_lmdb.convert.sources._scratch import Spool

__all__ = ["NameDigest", "digest_of"]


@dataclass(frozen=True)
class NameDigest:
    """Number and hash of a sequence of names."""

    num_names: int
    hexdigest: str
    """32 hex digits over all of them."""
    repeated: str | None
    """The first name to occur a second time, or None; if very many do, any one of them."""


def _hash(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=8).digest()


def digest_of(
    names: Callable[[], Iterable[str]],
    *,
    kept_bytes: int,
    max_suspects: int = 1000,
    hash_of: Callable[[bytes], bytes] = _hash,
) -> NameDigest:
    """Count and hash names, and find one that comes twice.

    Args:
        names: called again to find the repeated name if two hashes are equal.
        kept_bytes: how many bytes of hashes, 8 per name, to hold in memory; the rest goes to a temporary file.
        max_suspects: about how many repeated hashes are compared by name. Among 100 million different names, the
            chance of one pair with equal hashes is 1 in 3,700.
        hash_of: the hash of a name, 8 bytes.

    Raises:
        SourceError: as ``Spool``.
    """
    total, num_names = hashlib.sha256(), 0
    hashes = Spool(kept_bytes)
    parts = [hashes.new() for _ in range(256)]  # by first byte; compared one after the other
    for name in names():
        raw = name.encode(errors="surrogateescape")
        total.update(raw + b"\n")
        value = hash_of(raw)
        hashes.append(value[0], value)
        num_names += 1
    suspects: set[bytes] = set()
    for part in parts:
        if len(suspects) < max_suspects:
            values = np.sort(np.frombuffer(hashes.whole(part), dtype=np.uint64))
            twice = values[1:][values[1:] == values[:-1]]
            suspects.update(value.tobytes() for value in twice[:max_suspects])
    repeated = None
    if suspects:
        repeated = repeated_name(
            name for name in names() if hash_of(name.encode(errors="surrogateescape")) in suspects
        )
    return NameDigest(num_names, total.hexdigest()[:32], repeated)
