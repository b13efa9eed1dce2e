"""Arguments that are false but given are not the default: they mean what they say, or are refused."""

import re

import pytest
from loading import EVAL, TRAIN, dali_on_the_cpu, flat, planned, torch_here
from samplers import EpochSampler

NUM_RECORDS = 24


@pytest.fixture(params=[dali_on_the_cpu, torch_here])
def loader_of(request, store_path):
    def make(**arguments):
        return request.param(
            store_path, **{"transform": TRAIN, "batch_size": 4, "return_index": True, **arguments}
        )

    return make


def records_of(loader):
    with loader:
        return [records.tolist() for _, _, records in loader]


def test_shuffle_may_be_a_bool_as_in_a_data_loader(loader_of):
    assert records_of(loader_of(shuffle=False)) == planned(shuffle="none", batch_size=4)
    assert records_of(loader_of(shuffle=True, transform=EVAL)) == planned(batch_size=4)
    listed = [5, 3, 1, 7]
    assert records_of(loader_of(shuffle=False, sampler=listed)) == [listed]
    given = EpochSampler(NUM_RECORDS, seed=2)
    shown = flat(records_of(loader_of(shuffle=False, sampler=given)))
    given.set_epoch(0)
    assert shown == list(given)
    weighted = {"weights": [1.0] * NUM_RECORDS}
    assert records_of(loader_of(shuffle=False, **weighted)) == records_of(loader_of(**weighted))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"last_batch": False}, "last_batch is False, expected 'drop', 'pad' or 'short'"),
        ({"last_batch": True}, "last_batch is True, expected 'drop', 'pad' or 'short'"),
        ({"last_batch": ""}, "last_batch is '', expected 'drop', 'pad' or 'short'"),
        ({"shuffle": ""}, "shuffle is '', expected 'full', 'block' or 'none'"),
        ({"shuffle": 0}, "shuffle is 0, expected 'full', 'block' or 'none'"),
        ({"shuffle": "", "sampler": [1, 2, 3, 4]}, "shuffle is '', expected"),
        ({"shuffle": True, "sampler": EpochSampler(NUM_RECORDS)}, "sampler decides the order"),
        ({"shuffle": True, "weights": [1.0] * NUM_RECORDS}, "weights decides the order"),
        ({"sampler": False}, "sampler is False"),
        ({"weights": False}, r"weights of shape \(\)"),
        ({"quarantine": ""}, "quarantine"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": False}, "batch_size is 0, expected at least 1"),
        ({"world_size": 0, "rank": 0}, "rank is 0, expected"),
        ({"rank": 0}, "give both or neither"),
        ({"dtype": ""}, "dtype is ''"),
        ({"layout": ""}, "layout is ''"),
        ({"device": ""}, "device is ''"),
        ({"on_bad": False}, "on_bad is False"),
        ({"transform": False}, "transform is False"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)),  # the same in each process
)
def test_what_cannot_be_meant_is_refused(loader_of, argument, message):
    with pytest.raises(ValueError, match=message):
        loader_of(**argument)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (dali_on_the_cpu, {"num_threads": 0}),
        (dali_on_the_cpu, {"prefetch_queue_depth": 0}),
        (dali_on_the_cpu, {"decode": ""}),
        (dali_on_the_cpu, {"decode_device": ""}),
        (dali_on_the_cpu, {"resize": False}),
        (dali_on_the_cpu, {"decode_scale": False}),
        (torch_here, {"num_workers": -1}),
    ],
)
def test_so_is_what_one_loader_alone_takes(store_path, make, argument):
    (name,) = argument
    with pytest.raises(ValueError, match=name):
        make(store_path, transform=EVAL, batch_size=4, **argument)
