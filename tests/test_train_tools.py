"""What a run writes for other tools: TensorBoard's events."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace

import pytest
from test_train import data, one_thread, tiny  # noqa: F401  # fixtures

from dali_lmdb.train import preflight, train
from dali_lmdb.train.distributed import launch
from dali_lmdb.train.scalars import Scalars

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard: pip install '.[tensorboard]'"
)


def scalars(folder):
    """(images, value) of each scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_scalars_go_on_after_a_resume(data, tmp_path):  # noqa: F811
    output, events = tmp_path / "run", tmp_path / "events"
    settings = tiny(
        data,
        batch_size=4,
        log_every=2,
        output=str(output),
        tensorboard=str(events),
        log_json=str(tmp_path / "log"),
    )
    launch(["-m", "dali_lmdb.train.rank", json.dumps(asdict(settings))], world_size=2)
    assert len(list(events.iterdir())) == 1, "rank 1 writes, too"

    killed = Scalars(str(events), images=48)  # a run that went on without saving
    killed.write({"loss": 1e9}, images=60)
    killed.close()
    train(replace(settings, epochs=2, resume=True))
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    shown = scalars(events)
    assert [images for images, _ in shown["loss"]] == [16, 32, 48, 56, 64, 72, 80, 88, 96]
    assert [value for _, value in shown["loss"]] == pytest.approx(
        [line["loss"] for line in logged if "lr" in line]
    )
    assert [images for images, _ in shown["val_top1"]] == [48, 96]
    assert {"lr", "images_per_s", "data_wait_fraction", "val_top5", "val_loss"} <= shown.keys()


def test_tensorboard_that_is_not_installed_is_refused_before_work_starts(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # importing it fails
    settings = tiny(data, tensorboard=str(tmp_path / "events"))
    with pytest.raises(ValueError, match=r"^--tensorboard: .*; pip install 'dali-lmdb\[tensorboard\]'$"):
        preflight.check(settings, world_size=1, ranks_per_node=1)
    assert not (tmp_path / "events").exists()
