"""One rank that the command has started; not for use by hand.

``python -m dali_lmdb.train.rank '{"train": …}'`` reads its settings as JSON. They have been checked.
"""

from __future__ import annotations

import json
import logging
import os
import sys

__all__ = ["show_progress"]


def show_progress(*, rank: int) -> None:
    """Print what the trainer logs, on rank 0 only."""
    logger = logging.getLogger("dali_lmdb")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _main() -> None:
    from dali_lmdb.train.distributed import run_rank
    from dali_lmdb.train.settings import TrainSettings
    from dali_lmdb.train.trainer import train

    settings = TrainSettings(**json.loads(sys.argv[1]))
    show_progress(rank=int(os.environ["RANK"]))
    run_rank(lambda: train(settings), show_errors=False)


if __name__ == "__main__":
    _main()
