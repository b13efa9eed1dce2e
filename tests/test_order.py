import itertools
import time
import tracemalloc

import numpy as np
import pytest

from dali_lmdb.plan.order import BLOCK_RECORDS, WINDOW_BLOCKS, StepPlan, epoch_order

WINDOW_RECORDS = BLOCK_RECORDS * WINDOW_BLOCKS
SIZES = [1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 100, 127, 128, 129, 1000, 4095, 4096, 4097, 4196, 8192, 8193, 10_007]


PINNED = {
    "full": [2, 1, 8, 4, 6, 0, 5, 9, 7, 3],
    "seed": [3, 5, 4, 8, 1, 6, 7, 9, 2, 0],
    "epoch": [7, 8, 4, 6, 3, 9, 2, 0, 5, 1],
    "imagenet": [545995, 546987, 1086709, 967670, 531884],
    "large": [684103561980, 417167761816, 143570247373, 81251128592],
    "block": [2203, 2783, 2892, 4151, 2094],
}


def order_of(num_records, *, seed=0, epoch=0, shuffle="full"):
    return epoch_order(num_records, seed=seed, epoch=epoch, shuffle=shuffle)(np.arange(num_records))


def chi_square(counts, expected):
    """How many standard deviations the counts are from uniform, given a multinomial of len(counts) cells."""
    counts = np.asarray(counts, dtype=float)
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("shuffle", ["full", "block", "none"])
@pytest.mark.parametrize("num_records", SIZES)
def test_every_record_has_one_position(num_records, shuffle):
    for seed, epoch in [(0, 0), (1, 0), (0, 1), (2**63, 12345)]:
        order = order_of(num_records, seed=seed, epoch=epoch, shuffle=shuffle)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(num_records))


@pytest.mark.parametrize("shuffle", ["full", "block", "none"])
@pytest.mark.parametrize("num_records", [1, 3, 100, 4097, 4196, 8500])
def test_a_position_has_the_same_record_however_it_is_asked_for(num_records, shuffle):
    order = epoch_order(num_records, seed=5, epoch=2, shuffle=shuffle)
    whole = order(np.arange(num_records))
    for size in (90, 1000):
        parts = [
            order(np.arange(at, min(at + size, num_records), dtype=np.int64)) for at in range(0, num_records, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    scattered = np.random.default_rng(0).permutation(num_records)
    assert np.array_equal(order(scattered), whole[scattered])
    assert order(np.array([num_records - 1]))[0] == whole[-1]
    assert order(np.array([], dtype=np.int64)).shape == (0,)


def test_stored_order_is_stored_order():
    assert np.array_equal(order_of(1000, seed=3, epoch=4, shuffle="none"), np.arange(1000))


def test_pinned_orders_do_not_change():
    """A change of these is a change of every run that is resumed: the format of checkpoints."""
    assert order_of(10).tolist() == PINNED["full"]
    assert order_of(10, seed=1).tolist() == PINNED["seed"]
    assert order_of(10, epoch=1).tolist() == PINNED["epoch"]
    assert epoch_order(1_281_167, seed=42, epoch=7)(np.arange(5)).tolist() == PINNED["imagenet"]
    assert epoch_order(1 << 40, seed=0, epoch=0)(np.arange(4)).tolist() == PINNED["large"]
    assert order_of(5000, shuffle="block")[:5].tolist() == PINNED["block"]


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_seeds_and_epochs_have_orders_of_their_own(shuffle):
    orders = [
        order_of(5000, seed=seed, epoch=epoch, shuffle=shuffle).tolist() for seed in range(3) for epoch in range(3)
    ]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("num_records", [2, 3])
def test_all_orders_of_few_records_are_equally_likely(num_records):
    found = [tuple(order_of(num_records, seed=seed).tolist()) for seed in range(720)]
    counts = [found.count(order) for order in itertools.permutations(range(num_records))]
    assert chi_square(counts, 720 / len(counts)) < 4


@pytest.mark.parametrize("vary", ["seed", "epoch"])
def test_every_record_is_equally_likely_at_every_position(vary):
    draws, num_records = 1000, 10
    counts = np.zeros((num_records, num_records))
    for n in range(draws):
        counts[np.arange(num_records), order_of(num_records, **{vary: n})] += 1
    # The table's rows and columns are fixed, so it has (n - 1)^2 degrees of freedom.
    freedom = (num_records - 1) ** 2
    statistic = ((counts - draws / num_records) ** 2 / (draws / num_records)).sum()
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_coarse_bins_of_positions_and_records_are_equally_filled(shuffle):
    num_records, epochs, bins = 64 * 256, 40, 8
    counts = np.zeros((bins, bins))
    for epoch in range(epochs):
        order = order_of(num_records, epoch=epoch, shuffle=shuffle)
        np.add.at(counts, (np.arange(num_records) * bins // num_records, order * bins // num_records), 1)
    expected = num_records * epochs / bins**2
    # Blocks move as wholes: 64 records are one draw.
    draws_are = BLOCK_RECORDS if shuffle == "block" else 1
    statistic = ((counts - expected) ** 2 / expected).sum() / draws_are
    freedom = (bins - 1) ** 2
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbouring_positions_say_nothing_about_each_other():
    num_records, bins = 1000, 20
    counts = np.zeros(bins)
    parity = 0
    for epoch in range(60):
        order = order_of(num_records, epoch=epoch)
        steps = np.diff(order) % num_records
        counts += np.histogram(steps, bins=bins, range=(0, num_records))[0]
        parity += ((order[1:] ^ order[:-1]) & 1).sum()
    total = 60 * (num_records - 1)
    assert chi_square(counts, total / bins) < 5
    assert abs(parity - total / 2) < 5 * np.sqrt(total) / 2


@pytest.mark.parametrize("lag", [1, 2, 64, 512])
def test_positions_are_not_correlated_with_later_ones(lag):
    order = order_of(20_000, seed=3).astype(float)
    assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(len(order))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 0), (0, 1)),
        ((0, 5), (0, 6)),
        ((0, 0), (1, 0)),
        ((7, 0), (8, 0)),
        ((1, 0), (0, 1)),
        ((3, 4), (4, 3)),
        ((0, 0), (2**32, 0)),
        ((0, 0), (0, 2**32)),
        ((0, 0), (-1, 0)),
    ],
    ids=str,
)
def test_epochs_and_seeds_are_not_correlated(one, other):
    num_records = 20_000
    a = order_of(num_records, seed=one[0], epoch=one[1])
    b = order_of(num_records, seed=other[0], epoch=other[1])
    limit = 5 / np.sqrt(num_records)
    assert abs(np.corrcoef(a, b)[0, 1]) < limit
    # Where does a record of one order stand in the other?
    assert abs(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1]) < limit
    assert (a == b).sum() < 10  # 1 expected
    # The same neighbours: 1 pair expected.
    assert len(set(itertools.pairwise(a)) & set(itertools.pairwise(b))) < 10


@pytest.mark.parametrize("num_records", [4096, 3 * 4096, 4096 + 640, 4096 + 700, 100, 50])
def test_a_window_of_block_order_holds_whole_blocks(num_records):
    order = order_of(num_records, seed=1, shuffle="block")
    whole_blocks = num_records // BLOCK_RECORDS
    for start in range(0, num_records, WINDOW_RECORDS):
        window = order[start : start + WINDOW_RECORDS]
        blocks, counts = np.unique(window // BLOCK_RECORDS, return_counts=True)
        assert set(counts[blocks < whole_blocks]) <= {BLOCK_RECORDS}
        if len(window) > 500:
            assert len(np.unique(window[:64] // BLOCK_RECORDS)) > 4  # mixed inside the window


def test_block_order_moves_blocks_far():
    order = order_of(64 * 1024, shuffle="block")
    first_window = np.unique(order[:WINDOW_RECORDS] // BLOCK_RECORDS)
    assert first_window.max() > 800
    assert first_window.min() < 200


def test_a_trillion_records_need_no_table():
    order = epoch_order(1 << 40, seed=0, epoch=0)
    order(np.arange(10))
    tracemalloc.start()
    begin = time.perf_counter()
    records = order(np.arange(1 << 39, (1 << 39) + 256))
    elapsed_s = time.perf_counter() - begin
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(records)) == 256
    assert 0 <= records.min()
    assert records.max() < 1 << 40
    assert peak_bytes < 1 << 20
    assert elapsed_s < 1


@pytest.mark.parametrize(
    "arguments",
    [{"num_records": -1}, {"num_records": (1 << 40) + 1}, {"shuffle": "random"}, {"shuffle": None}],
    ids=str,
)
def test_wrong_arguments_of_an_order_are_value_errors(arguments):
    with pytest.raises(ValueError, match="expected"):
        epoch_order(**{"num_records": 10, "seed": 0, "epoch": 0, "shuffle": "full"} | arguments)


def plans(num_positions, batch_size, world_size, last_batch):
    return [
        StepPlan(
            num_positions=num_positions,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            last_batch=last_batch,
        )
        for rank in range(world_size)
    ]


def steps_of(plan, start=0):
    """The rank's positions, step by step."""
    steps = []
    while (positions := plan.positions(start)) is not None:
        steps.append(positions)
        start = plan.end_of_step(start)
    return steps


GRID = [
    (num_positions, batch_size, world_size)
    for num_positions in (1, 2, 3, 7, 16, 33, 64)
    for batch_size in (1, 2, 3, 8)
    for world_size in (1, 2, 3, 8)
]


@pytest.mark.parametrize("fraction", [0, 0.4, 1])
def test_short_last_batches_give_every_position_once(fraction):
    for num_positions, batch_size, world_size in GRID:
        start = int(num_positions * fraction)
        ranks = [steps_of(plan, start) for plan in plans(num_positions, batch_size, world_size, "short")]
        every = [position for steps in ranks for part in steps for position in part.tolist()]
        assert sorted(every) == list(range(start, num_positions))
        sizes = [len(part) for steps in ranks for part in steps]
        assert all(1 <= size <= batch_size for size in sizes)
        # Ranks share the last step evenly: at most one record more or less.
        per_rank = [sum(len(part) for part in steps) for steps in ranks]
        assert max(per_rank) - min(per_rank) <= 1
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("fraction", [0, 0.4, 1])
def test_dropped_last_batches_leave_equal_steps_on_all_ranks(fraction):
    for num_positions, batch_size, world_size in GRID:
        start = int(num_positions * fraction)
        ranks = [steps_of(plan, start) for plan in plans(num_positions, batch_size, world_size, "drop")]
        num_steps = (num_positions - start) // (batch_size * world_size)
        assert {len(steps) for steps in ranks} == {num_steps}
        every = [position for steps in ranks for part in steps for position in part.tolist()]
        assert sorted(every) == list(range(start, start + num_steps * batch_size * world_size))


@pytest.mark.parametrize("fraction", [0, 0.4, 1])
def test_padded_last_batches_are_full_and_repeat_the_beginning(fraction):
    for num_positions, batch_size, world_size in GRID:
        start = int(num_positions * fraction)
        ranks = [steps_of(plan, start) for plan in plans(num_positions, batch_size, world_size, "pad")]
        num_steps = -(-(num_positions - start) // (batch_size * world_size))
        assert {len(steps) for steps in ranks} == {num_steps}
        assert {len(part) for steps in ranks for part in steps} <= {batch_size}
        # Step by step and rank by rank, positions simply go on and start again.
        dealt = [position for step in zip(*ranks, strict=True) for part in step for position in part.tolist()]
        expected = (start + np.arange(num_steps * batch_size * world_size)) % num_positions
        assert dealt == expected.tolist()


@pytest.mark.parametrize("last_batch", ["drop", "pad", "short"])
def test_the_number_of_steps_is_known_before(last_batch):
    for num_positions, batch_size, world_size in GRID:
        for plan in plans(num_positions, batch_size, world_size, last_batch):
            for start in {0, 1, num_positions // 2, num_positions}:
                assert plan.num_steps(start) == len(steps_of(plan, start))


def test_a_global_step_is_the_same_set_for_every_rank():
    for num_positions, batch_size, world_size in GRID:
        for plan in plans(num_positions, batch_size, world_size, "short"):
            start = 0
            while start < num_positions:
                end = plan.end_of_step(start)
                assert end == min(start + batch_size * world_size, num_positions)
                positions = plan.positions(start)
                if positions is not None:
                    assert start <= positions[0]
                    assert positions[-1] < end
                start = end


def test_the_table_in_the_docstring_is_true():
    def step(last_batch, start):
        parts = [plan.positions(start) for plan in plans(7, 2, 2, last_batch)]
        return [None if part is None else part.tolist() for part in parts]

    for last_batch in ("short", "pad", "drop"):
        assert step(last_batch, 0) == [[0, 1], [2, 3]]
    assert step("short", 4) == [[4], [5, 6]]
    assert step("pad", 4) == [[4, 5], [6, 0]]
    assert step("drop", 4) == [None, None]


def test_fewer_positions_than_ranks_leave_ranks_without_a_step():
    ranks = [steps_of(plan) for plan in plans(3, 4, 8, "short")]
    assert sorted(len(steps) for steps in ranks) == [0] * 5 + [1] * 3
    assert sorted(part.item() for steps in ranks for part in steps) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_world_and_batch_sizes_may_change_within_an_epoch(seed):
    random = np.random.default_rng(seed)
    num_positions, start, seen = 500, 0, []
    for world_size, batch_size in [(8, 4), (3, 7), (5, 2), (1, 16)]:
        ranks = plans(num_positions, batch_size, world_size, "short")
        last = world_size == 1
        for _ in range(1000 if last else random.integers(1, 5)):
            if start >= num_positions:
                break
            seen += [position for plan in ranks for position in plan.positions(start).tolist()]
            start = ranks[0].end_of_step(start)
    assert sorted(seen) == list(range(num_positions))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"rank": 2},
        {"rank": -1},
        {"world_size": 0},
        {"last_batch": "keep"},
        {"last_batch": None},
    ],
    ids=str,
)
def test_wrong_arguments_of_a_step_plan_are_value_errors(arguments):
    with pytest.raises(ValueError, match="expected"):
        StepPlan(**{"num_positions": 10, "batch_size": 2, "rank": 0, "world_size": 2} | arguments)
