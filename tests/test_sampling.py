import math
import re
import threading

import numpy as np
import pytest
import torch
from samplers import EpochSampler
from torch.utils.data import BatchSampler, DistributedSampler, Sampler, SequentialSampler, SubsetRandomSampler

from dali_lmdb.plan.order import epoch_order
from dali_lmdb.plan.sampling import AllRecords, Listed, Sampled, Weighted, sampling_of


def sampling(num_records=10, **arguments):
    given = {"sampler": None, "weights": None, "seed": 0, "shuffle": None, "default_shuffle": "full"}
    return sampling_of(num_records, **given | arguments)


def epoch_of(samples, epoch=0):
    return samples.records(np.arange(samples.num_positions), epoch=epoch).tolist()


def test_by_default_every_record_comes_once_in_the_epochs_order():
    samples = sampling(100, seed=3)
    assert isinstance(samples, AllRecords)
    assert epoch_of(samples, 4) == epoch_order(100, seed=3, epoch=4)(np.arange(100)).tolist()
    assert epoch_of(sampling(100, shuffle="none")) == list(range(100))


@pytest.mark.parametrize(
    "make", [list, tuple, np.array, lambda indices: np.array(indices, dtype=np.int32), torch.tensor]
)
def test_listed_records_come_as_listed(make):
    samples = sampling(sampler=make([7, 0, 7, 9]))
    assert isinstance(samples, Listed)
    assert samples.num_positions == 4
    assert epoch_of(samples, 0) == epoch_of(samples, 1) == [7, 0, 7, 9]


def test_a_range_is_a_list():
    assert epoch_of(sampling(sampler=range(9, -1, -3))) == [9, 6, 3, 0]


def test_listed_records_are_shuffled_when_asked():
    indices = np.arange(0, 200, 2)
    samples = sampling(200, sampler=indices, shuffle="full")
    first, second = epoch_of(samples, 0), epoch_of(samples, 1)
    assert sorted(first) == sorted(second) == indices.tolist()
    assert first != second != indices.tolist()


@pytest.mark.parametrize("scale", [1e308, 1e-308, 5e-324, 2.0**-1074 * 3, 1])
def test_weights_of_any_size_draw_alike(scale):
    weights = np.array([0, 1, 0, 1, 1, 0, 1, 0] * 25, dtype=np.float64)
    assert epoch_of(sampling(200, weights=weights * scale), 3) == epoch_of(sampling(200, weights=weights), 3)


def test_weights_beside_which_others_are_nothing_are_drawn_alone():
    weights = np.array([5e-324, 1.7e308, 0, 1.7e308, 1e-300])
    assert set(epoch_of(sampling(5, weights=weights), 0)) <= {1, 3}


def test_weighted_draws_follow_the_weights():
    weights = np.array([0, 1, 2, 0, 5, 0.5, 0])
    draws = 4000
    samples = sampling(7, weights=weights)
    assert isinstance(samples, Weighted)
    assert samples.num_positions == 7
    counts = np.bincount(
        [record for epoch in range(draws // 7) for record in epoch_of(samples, epoch)], minlength=7
    )
    expected = weights / weights.sum() * counts.sum()
    assert (counts[weights == 0] == 0).all()
    spread = np.sqrt(expected) + 1e-9
    assert (np.abs(counts - expected) <= 5 * spread).all()


def test_weighted_draws_are_a_function_of_seed_epoch_and_position():
    weights = np.linspace(0, 1, 1000)
    samples = sampling(1000, weights=weights, seed=1)
    whole = np.array(epoch_of(samples, 2))
    scattered = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(samples.records(scattered, epoch=2), whole[scattered])
    assert not np.array_equal(whole, epoch_of(samples, 3))
    assert not np.array_equal(whole, epoch_of(sampling(1000, weights=weights, seed=2), 2))
    other = epoch_of(samples, 3)
    assert abs(np.corrcoef(whole, other)[0, 1]) < 5 / math.sqrt(1000)


def test_a_torch_sampler_decides_and_is_told_the_epoch():
    sampler = EpochSampler(10, seed=5)
    samples = sampling(sampler=sampler)
    assert isinstance(samples, Sampled)
    for epoch in (0, 3, 0):
        found = epoch_of(samples, epoch)
        sampler.set_epoch(epoch)
        assert found == list(sampler)
    assert epoch_of(sampling(sampler=SequentialSampler(range(10)))) == list(range(10))


def test_a_sampler_whose_length_lies_is_refused():
    class Lying(Sampler):
        def __len__(self):
            return 5

        def __iter__(self):
            return iter(range(3))

    with pytest.raises(ValueError, match=r"3 indices in epoch 0, its len\(\) is 5"):
        epoch_of(sampling(sampler=Lying()))


def test_two_threads_may_ask_a_sampler_for_different_epochs():
    sampler = EpochSampler(1000)
    samples = sampling(1000, sampler=sampler)
    expected = {epoch: epoch_of(samples, epoch) for epoch in (6, 7)}
    found = {6: [], 7: []}

    def ask(epoch):
        for _ in range(200):
            found[epoch].append(epoch_of(samples, epoch))

    threads = [threading.Thread(target=ask, args=(epoch,)) for epoch in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == expected[epoch] for epoch in found for one in found[epoch])
    assert sampler.asked == 2


def test_an_epoch_that_a_sampler_got_wrong_stays_wrong():
    class Short(Sampler):
        def __len__(self):
            return 5

        def __iter__(self):
            return iter(range(4))

    samples = sampling(sampler=Short())
    for _ in range(2):
        with pytest.raises(ValueError, match="4 indices"):
            samples.records(np.array([0]), epoch=0)


def test_different_samplings_have_different_identities():
    samplings = [
        sampling(),
        sampling(shuffle="none"),
        sampling(shuffle="block"),
        sampling(sampler=[1, 2, 3]),
        sampling(sampler=torch.tensor([1, 2, 4])),
        sampling(sampler=[1, 2, 3], shuffle="full"),
        sampling(weights=[1] * 10),
        sampling(weights=[1] * 9 + [2]),
        sampling(sampler=SequentialSampler(range(10))),
    ]
    identities = [samples.identity for samples in samplings]
    assert len(set(identities)) == len(identities)
    assert all(isinstance(identity, str) and len(identity) < 100 for identity in identities)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampler": []},
        {"sampler": torch.tensor([])},
        {"sampler": iter([1, 2])},
        {"sampler": [10]},
        {"sampler": [-1]},
        {"sampler": [0.5]},
        {"sampler": [[1, 2]]},
        {"sampler": ["a"]},
        {"weights": [1] * 9},
        {"weights": [0] * 10},
        {"weights": [-1] + [1] * 9},
        {"weights": [float("nan")] * 10},
        {"weights": [float("inf")] * 10},
        {"weights": [[1] * 10]},
        {"weights": [1] * 10, "sampler": [1]},
        {"weights": [1] * 10, "shuffle": "full"},
        {"sampler": SequentialSampler(range(10)), "shuffle": "full"},
        {"shuffle": "random"},
        {"sampler": [1], "shuffle": "random"},
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),  # the same in each process
)
def test_wrong_samplings_are_value_errors(arguments):
    with pytest.raises(ValueError, match=r"sampler|weights|shuffle"):
        sampling(**arguments)


class ShardedSampler(EpochSampler):
    """Gives one rank's part, as mmengine's ``DefaultSampler``."""

    rank, world_size = 1, 2


class WrappingSampler(EpochSampler):
    """Reorders what another one gives."""

    def __init__(self, sampler):
        super().__init__(len(sampler))
        self.sampler = sampler


@pytest.mark.parametrize(
    "sampler",
    [
        DistributedSampler(range(10), num_replicas=2, rank=1),
        ShardedSampler(10),
        WrappingSampler(DistributedSampler(range(10), num_replicas=2, rank=1)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_sampler_that_already_deals_to_ranks_is_refused(sampler):
    with pytest.raises(ValueError, match=r"which divides records among ranks, as the loader does itself"):
        sampling(sampler=sampler)


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_batch_sampler_is_refused_with_what_to_give(drop_last):
    batches = BatchSampler(SequentialSampler(range(10)), batch_size=4, drop_last=drop_last)
    with pytest.raises(ValueError, match=r"sampler gives lists, as a BatchSampler does, .*; give its sampler"):
        epoch_of(sampling(sampler=batches))


def test_a_sampler_without_records_is_refused():
    with pytest.raises(ValueError, match="sampler is empty"):
        sampling(sampler=SubsetRandomSampler([]))
