"""The saved state of a loader: its place, a few integers, and the identity of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dali_lmdb.errors import StateError

__all__ = ["LoaderState"]

_MUST_AGREE = ("fingerprint", "num_positions", "seed", "order")


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """A place in the epochs of a data set; no rank, batch size or world size."""

    seed: int
    epoch: int
    position: int
    """Number of positions of the epoch that all ranks together have consumed."""
    order: str
    """``Sampling.identity``."""
    fingerprint: str
    """Fingerprint of the store."""
    num_positions: int
    """Number of positions in an epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoaderState:
        """Restore what ``to_dict`` returned.

        Raises:
            StateError: not such a dictionary.
        """
        types = {"str": str, "int": int}
        expected = {field.name: types[str(field.type)] for field in fields(cls)}
        found = {name: type(value) for name, value in values.items()} if isinstance(values, Mapping) else values
        if found != expected:
            raise StateError(
                f"loader state: {values!r}, expected a dictionary with {', '.join(expected)}; "
                "give what state_dict() of this version returned"
            )
        return cls(**values)

    def check_against(self, own: LoaderState, *, where: str) -> None:
        """Compare with the state of the loader that resumes from it.

        Args:
            where: names the loader in messages.

        Raises:
            StateError: another data set, seed or order; the message prints both sides.
        """
        differences = [
            f"{name} {getattr(self, name)!r} (here {getattr(own, name)!r})"
            for name in _MUST_AGREE
            if getattr(self, name) != getattr(own, name)
        ]
        if differences:
            raise StateError(
                f"{where}: the state was saved with {', '.join(differences)}; "
                "resume with the same data set and settings, or start again"
            )
        if not 0 <= self.position <= self.num_positions or self.epoch < 0:
            raise StateError(
                f"{where}: the state is at epoch {self.epoch}, position {self.position}, expected an epoch from 0 "
                f"and a position from 0 to {self.num_positions}; it was altered"
            )
