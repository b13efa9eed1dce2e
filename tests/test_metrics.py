import json
import math
import time

import pytest
import torch

from dali_lmdb.train.metrics import EvaluationSums, JsonLog, StepMeter
from dali_lmdb.train.schedule import WARM_UP, learning_rate

CPU = torch.device("cpu")


def alone(values):
    return values


def evaluated(logits, labels):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    sums = EvaluationSums(num_classes=logits.shape[1], device=CPU)
    sums.add(logits, torch.tensor(labels))
    return sums


def test_top1_and_top5_are_percent_of_records():
    # Labels are ranked 0, 1, 2 ...: 0 is in the top 1, 4 in the top 5, 5 and 7 are in neither.
    logits = -torch.arange(8.0).repeat(4, 1)
    report = evaluated(logits, [0, 4, 5, 7]).report(num_records=4, all_sum=alone)
    assert report["val_top1"] == 25
    assert report["val_top5"] == 50
    assert report["val_records"] == 4


def test_top5_looks_at_all_classes_when_there_are_fewer_than_five():
    report = evaluated([[3.0, 2.0, 1.0]], [2]).report(num_records=1, all_sum=alone)
    assert report["val_top1"] == 0
    assert report["val_top5"] == 100


def test_validation_loss_is_the_mean_over_records_not_over_batches():
    sums = evaluated([[0.0, 0.0]] * 3, [0, 1, 0])
    sums.add(torch.tensor([[50.0, 0.0]]), torch.tensor([0]))
    report = sums.report(num_records=4, all_sum=alone)
    assert report["val_loss"] == pytest.approx(math.log(2) * 3 / 4)


def test_a_rank_without_batches_adds_nothing():
    other = torch.tensor([1.0, 2.0, 0.5, 2.0], dtype=torch.float64)
    report = EvaluationSums(num_classes=2, device=CPU).report(num_records=2, all_sum=lambda own: own + other)
    assert report == {"val_top1": 50, "val_top5": 100, "val_loss": 0.25, "val_records": 2}


def test_a_record_counted_twice_or_not_at_all_is_an_error():
    with pytest.raises(RuntimeError, match="counted 1 records, expected each of 2 once"):
        evaluated([[1.0, 0.0]], [0]).report(num_records=2, all_sum=alone)


def test_the_reported_loss_is_the_mean_since_the_last_report():
    meter = StepMeter(device=CPU)
    meter.add(loss=torch.tensor(9.0), num_images=1)
    meter.report(all_sum=alone)
    meter.add(loss=torch.tensor(1.0), num_images=1)
    meter.add(loss=torch.tensor(2.0), num_images=1)
    assert meter.report(all_sum=alone)["loss"] == 1.5


def test_images_per_second_are_summed_over_ranks_and_the_rest_is_averaged():
    meter = StepMeter(device=CPU)
    meter.wait_for(lambda: sum(range(100_000)))
    meter.add(loss=torch.tensor(3.0), num_images=10)
    own = []

    def twice(values):
        own.extend(values.tolist())
        return values * 2

    report = meter.report(all_sum=twice)
    loss, images_per_s, wait, _ = own
    assert report == {"loss": loss, "images_per_s": 2 * images_per_s, "data_wait_fraction": wait}
    assert 0 < wait <= 1


def test_nothing_waited_for_is_a_wait_fraction_of_zero():
    meter = StepMeter(device=CPU)
    meter.add(loss=torch.tensor(3.0), num_images=10)
    assert meter.report(all_sum=alone)["data_wait_fraction"] == 0


def test_the_first_batch_is_not_timed_if_others_follow_before_the_report():
    began, meter = time.perf_counter(), StepMeter(device=CPU)
    for num_images in (10**9, 1):
        meter.wait_for(lambda: None)
        meter.add(loss=torch.tensor(float(num_images)), num_images=num_images)
    report = meter.report(all_sum=alone)
    assert report["images_per_s"] * (time.perf_counter() - began) < 10**9
    assert report["loss"] == (10**9 + 1) / 2


def test_the_learning_rate_rises_to_the_highest_then_falls_to_zero():
    rates = [learning_rate(progress / 100, epochs=10, highest=0.4) for progress in range(1001)]
    top = round(WARM_UP * 1000)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == rates[top] == 0.4
    assert rates[-1] == pytest.approx(0)


def test_a_log_line_is_on_disk_before_the_log_is_closed(tmp_path):
    with JsonLog(tmp_path / "log", append=False) as log:
        before = time.time()
        log.write(epoch=0, step=1)
        line = json.loads((tmp_path / "log").read_text())
        assert before - 1 <= line.pop("time") <= time.time() + 1
        assert line == {"epoch": 0, "step": 1}


def test_a_log_is_kept_or_started_again_as_asked(tmp_path):
    for append, lines in ((False, 1), (True, 2), (False, 1)):
        with JsonLog(tmp_path / "log", append=append) as log:
            log.write(epoch=0)
        assert len((tmp_path / "log").read_text().splitlines()) == lines
