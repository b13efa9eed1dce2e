"""What a run says and draws at its end."""

import importlib.util
import re
import sys
from dataclasses import replace

import pytest
from PIL import Image
from test_train import data, one_thread, tiny  # noqa: F401  # fixtures

from dali_lmdb.train import checkpoint, train
from dali_lmdb.train.curves import History

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib: pip install '.[plot]'"
)


def run_in_two_parts(data, output, **overrides):  # noqa: F811
    """A run of two epochs, resumed before the second; returns what the checkpoint keeps of it."""
    settings = tiny(data, batch_size=16, log_every=1, model_ema_decay=0.5, output=str(output), **overrides)
    train(settings)
    train(replace(settings, epochs=2, resume=True))
    return checkpoint.load(settings.checkpoint_path)


@needs_matplotlib
def test_a_resumed_run_ends_with_a_summary_and_the_curves_of_the_whole_run(data, tmp_path, caplog):  # noqa: F811
    caplog.set_level("INFO", logger="dali_lmdb")
    saved = run_in_two_parts(data, tmp_path, log_json=str(tmp_path / "log"))
    history = saved["history"]
    assert [place for place, _, _, _ in history["steps"]] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert [result["epoch"] for result in history["results"]] == [0, 1]
    assert history["results"][-1] == saved["result"]
    best, last, trained = caplog.messages[-3:]
    accuracies = r"top-1 [\d.]+ %  top-5 100.00 %  loss \S+"
    assert re.fullmatch(rf"best: epoch [01]  validation: {accuracies}  averaged weights: {accuracies}", best)
    assert re.fullmatch(rf"last: epoch 1  validation: {accuracies}  averaged weights: {accuracies}", last)
    files = ", ".join(str(tmp_path / name) for name in ("log", "last.pt", "best.pt", "curves.png"))
    assert re.fullmatch(rf"trained for 0:0\d:\d\d, \d+ images/s; see {files}", trained)
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_without_matplotlib_says_how_to_get_it(data, tmp_path, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    caplog.set_level("INFO", logger="dali_lmdb")
    train(tiny(data, batch_size=16, log_every=1, output=str(tmp_path)))
    says = "no curves.png without matplotlib; pip install 'dali-lmdb[plot]'"
    assert [message for message in caplog.messages if message.startswith("no ")] == [says]
    assert not (tmp_path / "curves.png").exists()


@needs_matplotlib
def test_curves_that_cannot_be_written_are_said_and_the_run_is_complete(data, tmp_path, caplog):  # noqa: F811
    (tmp_path / "curves.png").mkdir()
    results = train(tiny(data, batch_size=16, log_every=1, output=str(tmp_path)))
    assert len(results) == 1
    assert caplog.messages[-1:] == [f"{tmp_path / 'curves.png'}: cannot be written: Is a directory"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_long_history_keeps_few_points_from_its_beginning_to_its_end():
    history = History()
    for step in range(1, 10_001):
        history.add_steps(step / 100, loss=step, lr=1.0)
    places, losses, rates, counts = zip(*history.steps, strict=True)
    assert 1000 <= len(history.steps) < 2000
    assert list(places) == sorted(places)
    assert losses == pytest.approx([100 * place for place in places])
    assert (places[0] < 0.1, places[-1] > 99.9, set(rates)) == (True, True, {1.0})
    assert (set(counts[:-1]), sum(counts)) == ({8}, 10_000)
