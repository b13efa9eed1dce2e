"""What is said at the end of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dali_lmdb.train import checkpoint, curves
from dali_lmdb.train.curves import History
from dali_lmdb.train.progress import describe, duration
from dali_lmdb.train.settings import TrainSettings

__all__ = ["summarise"]

_log = logging.getLogger(__name__)


def summarise(history: History, *, best: dict[str, Any], images_per_s: float, settings: TrainSettings) -> None:
    """Log the results of a whole run, and where they are; draw its curves.

    Args:
        best: the evaluation with the highest top-1.
        images_per_s: since this process started.
    """
    _log.info("best: %s", describe(best))
    _log.info("last: %s", describe(history.results[-1]))
    files = [] if settings.log_json is None else [settings.log_json]
    if settings.output is not None:
        names = [checkpoint.FILE_NAME, checkpoint.BEST_NAME, *_draw(history, Path(settings.output))]
        files += [str(Path(settings.output) / name) for name in names]
    where = f"; see {', '.join(files)}" if files else ""
    _log.info("trained for %s, %.0f images/s%s", duration(history.elapsed_s), images_per_s, where)


def _draw(history: History, folder: Path) -> list[str]:
    """Draw the curves if there is more than a point, and return the picture's name; an error is only said."""
    if len(history.steps) < 2:
        return []
    try:
        curves.draw(history, folder)
    except ImportError:
        _log.info("no %s without matplotlib; pip install 'dali-lmdb[plot]'", curves.CURVES_NAME)
    except OSError as error:
        _log.warning("%s: cannot be written: %s", folder / curves.CURVES_NAME, error.strerror)
    else:
        return [curves.CURVES_NAME]
    return []
