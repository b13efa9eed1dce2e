"""What a run writes for other tools: TensorBoard's events and the profiler's traces."""

import gzip
import importlib.util
import json
import sys
from collections import Counter
from dataclasses import asdict, replace

import pytest
from test_train import data, invoke, one_thread, tiny  # noqa: F401  # fixtures

from dali_lmdb.train import preflight, train
from dali_lmdb.train.distributed import launch
from dali_lmdb.train.scalars import Scalars

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard: pip install '.[tensorboard]'"
)


def ranges(folder, rank):
    """How often each of our ranges is in a rank's trace."""
    with gzip.open(folder / f"trace-{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def scalars(folder):
    """(images, value) of each scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_traces_of_each_rank_and_scalars_that_go_on_after_a_resume(data, tmp_path):  # noqa: F811
    output, events = tmp_path / "run", tmp_path / "events"
    settings = tiny(
        data,
        batch_size=4,
        log_every=2,
        output=str(output),
        tensorboard=str(events),
        profile=2,
        log_json=str(tmp_path / "log"),
    )
    launch(["-m", "dali_lmdb.train.rank", json.dumps(asdict(settings))], world_size=2)
    for rank in (0, 1):
        # It ends after its sixth step, the first one that is recorded.
        found = ranges(output, rank)
        assert (found["step"], found["data"], found["optimizer"]) == (1, 1, 1)
    assert len(list(events.iterdir())) == 1, "rank 1 writes, too"

    killed = Scalars(str(events), images=48)  # a run that went on without saving
    killed.write({"loss": 1e9}, images=60)
    killed.close()
    train(replace(settings, epochs=2, resume=True))
    found = ranges(output, 0)
    assert (found["step"], found["data"], found["optimizer"]) == (2, 2, 2)
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    shown = scalars(events)
    assert [images for images, _ in shown["loss"]] == [16, 32, 48, 56, 64, 72, 80, 88, 96]
    assert [value for _, value in shown["loss"]] == pytest.approx(
        [line["loss"] for line in logged if "lr" in line]
    )
    assert [images for images, _ in shown["val_top1"]] == [48, 96]
    assert {"lr", "images_per_s", "data_wait_fraction", "val_top5", "val_loss"} <= shown.keys()
    assert sorted(file.name for file in output.glob("*trace*")) == ["trace-0.json.gz", "trace-1.json.gz"]


def test_tensorboard_that_is_not_installed_is_refused_before_work_starts(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # importing it fails
    settings = tiny(data, tensorboard=str(tmp_path / "events"))
    with pytest.raises(ValueError, match=r"^--tensorboard: .*; pip install 'dali-lmdb\[tensorboard\]'$"):
        preflight.check(settings, world_size=1, ranks_per_node=1)
    assert not (tmp_path / "events").exists()


def test_a_run_too_short_for_a_trace_says_so_and_one_without_output_is_wrong_usage(data, tmp_path, caplog):  # noqa: F811
    train(tiny(data, batch_size=16, profile=2, output=str(tmp_path)))
    assert caplog.messages == ["--profile: no trace, since the run had no more than 5 steps"]
    result = invoke("--train", data.train, "--val", data.val, "--profile", "2")
    assert (result.exit_code, "--profile needs --output DIR" in result.output) == (2, True)


def test_the_log_and_the_quarantine_may_be_in_the_output_folder_or_beside_it_before_it_exists(data, tmp_path):  # noqa: F811
    log, quarantine = tmp_path / "runs" / "a.jsonl", tmp_path / "runs" / "a" / "bad.jsonl"
    settings = tiny(
        data, output=str(tmp_path / "runs" / "a"), log_json=str(log), quarantine=str(quarantine), resume=True
    )
    preflight.check(settings, world_size=1, ranks_per_node=1)
    train(settings)
    assert log.stat().st_size
    assert quarantine.exists()
    other = replace(settings, log_json=str(tmp_path / "other" / "a.jsonl"))
    with pytest.raises(ValueError, match="create it first"):
        preflight.check(other, world_size=1, ranks_per_node=1)
