"""Loaders made before the process group: they read their rank's records, or say that it is too late."""

import json
import multiprocessing

import pytest
import torch
from loading import EVAL, NUM_RECORDS, dali_on_the_cpu, flat, torch_here

SETTINGS = {"transform": EVAL, "batch_size": 5, "return_index": True}


def read_as_a_rank(make, store_path, folder, rank):
    loader, early = make(store_path, **SETTINGS), make(store_path, **SETTINGS)
    found = {"before": [len(loader), len(loader.sampler), loader.world_size]}
    next(iter(early))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found["after"] = [len(loader), len(loader.sampler), loader.rank, loader.world_size]
    found["records"] = flat([records.tolist() for _, _, records in loader])
    try:
        list(early)
    except RuntimeError as error:
        found["early"] = str(error)
    torch.distributed.destroy_process_group()
    found["again"] = flat([records.tolist() for _, _, records in loader])
    (folder / str(rank)).write_text(json.dumps(found))


@pytest.mark.parametrize("make", [dali_on_the_cpu, torch_here])
def test_rank_and_world_size_are_those_of_the_first_batch(make, store_path, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=read_as_a_rank, args=(make, store_path, tmp_path, rank)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert found["before"] == [5, NUM_RECORDS, 1]
        assert found["after"] == [3, NUM_RECORDS // 2, rank, 2]
        assert found["again"] == found["records"]
        assert found["early"].endswith(
            f"has given batches as rank 0 of 1, but this process is now rank {rank} of 2; make a new loader"
        )
    assert sorted(ranks[0]["records"] + ranks[1]["records"]) == list(range(NUM_RECORDS))


def test_without_a_group_several_ranks_are_warned_at_the_first_batch(store_path, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with torch_here(store_path, **SETTINGS) as loader:
        assert not caplog.records
        assert len(list(loader)) == len(list(loader)) == 5
    (warned,) = caplog.messages
    assert "WORLD_SIZE is 2" in warned
