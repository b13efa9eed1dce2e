import gc
import itertools
import json
import sys
import threading

import numpy as np
import pytest
import torch
from loading import (
    EVAL,
    NUM_RECORDS,
    TRAIN,
    dali_on_the_cpu,
    epoch_of,
    images_by_record,
    planned,
    torch_here,
    torch_in_workers,
)
from nvidia.dali import Pipeline

from dali_lmdb.errors import StateError
from dali_lmdb.loaders.prefetch import Prefetcher
from dali_lmdb.loaders.torch_loader import TorchLoader

# --- the first batch of a pipeline, which decides how many images the hardware engine gets


@pytest.mark.parametrize("first_is_full", [True, False])
def test_a_short_first_batch_is_padded_for_dali_but_not_handed_out_padded(store_path, first_is_full):
    """Without the hardware engine nothing is padded, so the loader is told that there is one."""
    arguments = {"transform": TRAIN, "batch_size": 7, "last_batch": "short", "return_index": True}
    padded = []
    with dali_on_the_cpu(store_path, **arguments) as loader, dali_on_the_cpu(store_path, **arguments) as plain:
        assert not loader._pad_first_batch
        loader._pad_first_batch = first_is_full
        feed = loader._make_feed

        def recording(plan, **options):
            if threading.current_thread() is threading.main_thread():  # plans are fed by another one
                padded.append(plan.records.tolist())
            return feed(plan, **options)

        loader._make_feed = recording
        state = plain.state_dict() | {"position": 21}  # three records are left
        for one in (loader, plain):
            one.load_state_dict(state)
        found, expected = list(loader), list(plain)
        assert [len(batch[1]) for batch in found] == [3]
        for ours, theirs in zip(found[0], expected[0], strict=True):
            assert torch.equal(ours, theirs)
        assert epoch_of(loader) == planned(epoch=1, batch_size=7, last_batch="short")
    assert padded == ([(found[0][2].tolist() * 3)[:7]] if first_is_full else [])


# --- resuming


def test_a_state_goes_on_with_the_next_step(make):
    for steps in (0, 1, 3, 6):
        loader = make()
        iterator = iter(loader)
        for _ in range(steps):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        assert epoch_of(resumed) == planned(batch_size=4)[steps:]
        assert epoch_of(resumed) == planned(epoch=1, batch_size=4)


def test_the_state_after_a_whole_epoch_is_the_next_epochs_beginning(make):
    loader = make()
    loader.set_epoch(4)
    list(loader)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert resumed.epoch == 5
    assert epoch_of(resumed) == planned(epoch=5, batch_size=4)


def test_a_state_may_be_loaded_in_the_middle_of_another_epoch(make):
    loader = make()
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    list(iterator)
    next(iter(loader))
    loader.load_state_dict(state)
    assert epoch_of(loader) == planned(batch_size=4)[2:]


def test_a_resumed_epoch_goes_on_when_the_loop_sets_it(make):
    loader = make()
    loader.set_epoch(2)
    next(iter(loader))
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(resumed.epoch)
    assert epoch_of(resumed) == planned(epoch=2, batch_size=4)[1:]
    resumed.set_epoch(0)
    assert epoch_of(resumed) == planned(epoch=0, batch_size=4)


def test_resuming_at_other_sizes_sees_every_other_record_with_the_same_augmentation(make, noise_path):
    expected = images_by_record(make(noise_path, batch_size=20, dtype="uint8"), epoch=3)
    seen = {}

    def run(state, *, world_size, batch_size, steps):
        states = []
        for rank in range(world_size):
            loader = make(
                noise_path,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                last_batch="short",
                dtype="uint8",
            )
            loader.load_state_dict(state)
            for images, _, records in itertools.islice(loader, steps):
                for image, record in zip(images.cpu(), records.tolist(), strict=True):
                    assert record not in seen
                    seen[record] = image.clone()
            states.append(loader.state_dict())
        assert all(state == states[0] for state in states)
        return states[0]

    first = make(noise_path, batch_size=20)
    first.set_epoch(3)
    state = first.state_dict()
    for world_size, batch_size, steps in [(4, 1, 1), (3, 2, 1), (2, 1, 1)]:
        state = json.loads(json.dumps(run(state, world_size=world_size, batch_size=batch_size, steps=steps)))
    assert (state["epoch"], state["position"]) == (3, 12)
    run(state, world_size=1, batch_size=5, steps=100)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[record], expected[record]) for record in expected)


def test_a_rank_with_a_step_left_but_none_in_a_whole_epoch_resumes(make):
    """Of 24 records and 26 ranks, rank 13 has none; of the last 23 records it has one."""
    place = {"batch_size": 1, "rank": 13, "world_size": 26}
    loader = make(transform=EVAL, **place)
    assert len(loader) == 0
    loader.load_state_dict(loader.state_dict() | {"position": 1})
    expected = planned(**place, last_batch="short", shuffle="none", start=1)
    assert len(expected) == 1
    assert epoch_of(loader) == expected
    assert epoch_of(loader) == []


def test_states_are_small_and_of_plain_types(make):
    state = make(seed=np.int64(5)).state_dict()
    assert len(json.dumps(state)) < 500
    assert {type(value) for value in state.values()} <= {int, str}
    loader = make(seed=5)
    loader.load_state_dict(state)
    loader.set_epoch(np.int64(2))
    assert {type(value) for value in loader.state_dict().values()} <= {int, str}


def test_states_of_other_data_seeds_or_orders_are_refused_with_both_sides(make, noise_path):
    state = make(seed=1).state_dict()
    for loader, both in [
        (make(seed=2), ("1", "2")),
        (make(seed=1, shuffle="none"), ("full", "none")),
        (make(noise_path, seed=1), ("24", "20")),
    ]:
        with pytest.raises(StateError) as info:
            loader.load_state_dict(state)
        assert all(repr(side) in str(info.value) or side in str(info.value) for side in both)
        assert "\n" not in str(info.value)
        before = loader.state_dict()
        assert (before["epoch"], before["position"]) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"position": -1},
        {"position": 25},
        {"position": "3"},
        {"position": 2.5},
        {"position": None},
        {"epoch": -1},
        {"epoch": "0"},
        {"more": 1},
    ],
    ids=str,
)
def test_impossible_states_are_refused(store_path, change):
    with torch_here(store_path, transform=TRAIN, batch_size=4) as loader:
        with pytest.raises(StateError):
            loader.load_state_dict(loader.state_dict() | change)
        for state in (None, {}, [], "state", 3):
            with pytest.raises(StateError):
                loader.load_state_dict(state)


def test_states_of_one_backend_continue_in_the_other(store_path):
    with (
        dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4, return_index=True) as one,
        torch_here(store_path, transform=TRAIN, batch_size=4, return_index=True) as other,
    ):
        next(iter(one))
        other.load_state_dict(one.state_dict())
        assert epoch_of(other) == planned(batch_size=4)[1:]


# --- after an exception

DALIS_STEP = ("schedule_run", "_legacy_interleaved_prefetch", "_run_input_callbacks", "share_outputs", "reset")


def belongs_to_a_step(code):
    """Whether it is code of loaders, or what DALI's Python code runs for a step."""
    in_dali = code.co_filename.endswith("/nvidia/dali/pipeline.py") and code.co_name in DALIS_STEP
    return in_dali or "/dali_lmdb/loaders/" in code.co_filename


def interrupted(function, *, at_line):
    """Call a function, and interrupt it before the given line, of all lines that belong to a step.

    Returns:
        Whether it ran so many.
    """
    lines = itertools.count()

    def trace(frame, event, _):
        if not belongs_to_a_step(frame.f_code):
            return None
        # Garbage collection may run it, and there interrupts are lost.
        if frame.f_code is Prefetcher.close.__code__:
            return None
        if event == "line" and next(lines) == at_line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_iterator_goes_on_with_the_state_wherever_it_was_interrupted(make, steps_before):
    loader = make()
    stride = 20 if isinstance(loader, TorchLoader) and loader.num_workers else 7
    for line in itertools.count(0, stride):
        loader.set_epoch(3 * line)  # not the epoch of which batches are under way
        iterator = iter(loader)
        for _ in range(steps_before):
            next(iterator)
        if not interrupted(lambda iterator=iterator: next(iterator), at_line=line):
            break
        state = loader.state_dict()
        rest = planned(epoch=state["epoch"], start=state["position"], batch_size=4)
        assert [records.tolist() for _, _, records in iterator] == rest
        assert len(rest) in (6 - steps_before, 5 - steps_before)
        assert epoch_of(loader) == planned(epoch=state["epoch"] + 1, batch_size=4)
    assert line > 20


def test_an_interrupted_first_step_leaves_no_thread_behind(store_path):
    gc.collect()
    gc.freeze()  # what earlier tests have left, so that collecting, below, is quick
    for line in itertools.count(0, 5):
        with dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4) as loader:
            ended = not interrupted(lambda loader=loader: next(iter(loader)), at_line=line)
        del loader
        gc.collect()
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("dali_lmdb")] == [], line
        if ended:
            break
    assert line > 60


def test_a_state_of_an_interrupted_step_resumes_in_the_loader_itself(make):
    loader = make()
    for line in (10, 20):
        loader.set_epoch(0)
        iterator = iter(loader)
        next(iterator), next(iterator)
        assert interrupted(lambda iterator=iterator: next(iterator), at_line=line)
        loader.load_state_dict(loader.state_dict())
        assert epoch_of(loader) == planned(batch_size=4)[2:]


def test_an_error_that_is_kept_keeps_no_pipeline(store_path):
    """One that waited for the collector might be collected in a forked worker, and hang there."""
    sampler = Shrinking()
    gc.collect()
    before = sum(type(thing) is Pipeline for thing in gc.get_objects())
    gc.disable()
    try:
        with dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4, sampler=sampler) as loader:
            loader.set_epoch(1)
            with pytest.raises(ValueError, match="23 indices"):
                next(iter(loader))
            sampler.mended = True
            assert len(list(loader)) == 6
        del loader
        assert sum(type(thing) is Pipeline for thing in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_worker_that_dies_is_an_error_and_then_replaced(store_path):
    with torch_in_workers(store_path, transform=TRAIN, batch_size=4, return_index=True) as loader:
        iterator = iter(loader)
        seen = [next(iterator)[2].tolist()]
        (worker,) = loader._run._decoded._workers
        # A worker that dies with this lock leaves torch's own code waiting for it, for ever.
        with loader._run._decoded._workers_done_event._cond:
            worker.kill()
            worker.join()
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            seen.extend(records.tolist() for _, _, records in iterator)
        assert seen + [records.tolist() for _, _, records in iterator] == planned(batch_size=4)
        assert epoch_of(loader) == planned(epoch=1, batch_size=4)


class Shrinking(torch.utils.data.Sampler):
    """Has a record less than it says from its second epoch on, until it is mended."""

    def __init__(self):
        self.epoch, self.mended = 0, False

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return NUM_RECORDS

    def __iter__(self):
        return iter(range(NUM_RECORDS if self.epoch == 0 or self.mended else NUM_RECORDS - 1))


def test_an_error_of_a_sampler_is_told_when_its_epoch_is_due(make):
    sampler = Shrinking()
    loader = make(sampler=sampler)
    expected = planned(shuffle="none", batch_size=4)
    for _ in range(2):
        loader.set_epoch(0)
        assert epoch_of(loader) == expected
        iterator = iter(loader)
        for _ in range(3):
            with pytest.raises(ValueError, match="23 indices in epoch 1"):
                next(iterator)
            assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)
    sampler.mended = True
    assert [records.tolist() for _, _, records in iterator] == expected


def test_a_sampler_that_fails_at_once_is_told_at_once_and_may_be_mended(make):
    sampler = Shrinking()
    loader = make(sampler=sampler)
    loader.set_epoch(1)
    with pytest.raises(ValueError, match="23 indices in epoch 1"):
        next(iter(loader))
    sampler.mended = True
    loader.set_epoch(1)
    assert epoch_of(loader) == planned(shuffle="none", batch_size=4)
