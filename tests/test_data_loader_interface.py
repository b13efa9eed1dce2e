"""What training scripts ask of a ``DataLoader``, asked of the loaders."""

import pytest
from loading import EVAL, NUM_RECORDS, flat, planned
from torch.utils.data import DataLoader

from dali_lmdb.loaders.torch_loader import TorchLoader

QUARTERS = {"world_size": 2, "batch_size": 4}


def test_the_data_set_has_what_an_image_folder_has(make, image_folder):
    loader = make()
    assert len(loader.dataset) == NUM_RECORDS
    assert loader.dataset.classes == loader.classes == ["ant", "bee", "cat"]
    assert loader.dataset.class_to_idx == {"ant": 0, "bee": 1, "cat": 2}
    assert loader.dataset.targets == loader.store.labels.tolist()
    assert loader.dataset.samples[9] == ("bee/009.jpg", 1)
    image, label = loader.dataset[9]
    assert (image.mode, label) == ("RGB", 1)
    assert loader.dataset is loader.dataset
    if isinstance(loader, TorchLoader):
        assert make(image_folder).dataset.samples == loader.dataset.samples


def test_the_numbers_are_a_data_loaders(make):
    loader = make(rank=1, **QUARTERS)
    assert (loader.batch_size, loader.rank, loader.world_size) == (4, 1, 2)
    assert loader.drop_last is True
    assert make(transform=EVAL).drop_last is False
    assert loader.pin_memory is False
    workers = getattr(loader, "num_workers", None)
    assert workers in ((0, 1) if isinstance(loader, TorchLoader) else (0,))


@pytest.mark.parametrize("last_batch", ["drop", "pad", "short"])
@pytest.mark.parametrize("num_records", [24, 23, 17])
def test_the_sampler_has_this_ranks_records(make, last_batch, num_records):
    lengths = []
    for rank in range(2):
        loader = make(rank=rank, sampler=range(num_records), shuffle="full", last_batch=last_batch, **QUARTERS)
        sampler = loader.sampler
        loader.sampler.set_epoch(3)
        assert loader.epoch == 3
        expected, batches = list(sampler), list(loader.batch_sampler)
        seen = [records.tolist() for _, _, records in loader]
        assert (flat(seen), seen) == (expected, batches)
        lengths.append((len(sampler), len(expected)))
    (length, _), (other, _) = lengths
    assert length == other == max(shown for _, shown in lengths)
    if last_batch != "drop":  # what examples/imagenet asks before it evaluates the rest of the set
        assert length * 2 >= num_records


def test_a_ranks_sampler_is_refused_by_another_loader(make):
    with pytest.raises(ValueError, match=r"RankSampler .*divides records among ranks"):
        make(sampler=make(**QUARTERS, rank=0).sampler)


def test_what_a_loader_cannot_have_says_what_to_use(make):
    loader = make()
    given = vars(DataLoader([1]))
    missing = [name for name in given if not name.startswith("_") and not hasattr(loader, name)]
    assert {"collate_fn", "generator", "worker_init_fn", "prefetch_factor", "timeout"} <= set(missing)
    for name in missing:
        with pytest.raises(AttributeError, match=rf"has no attribute '{name}': \w"):
            getattr(loader, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'colour'$"):
        loader.colour  # noqa: B018


def test_the_plan_is_not_disturbed_by_a_look_at_the_sampler(make):
    loader, seen = make(), []
    for _, _, records in loader:
        assert len(list(loader.sampler)) == NUM_RECORDS
        seen.append(records.tolist())
    assert seen == planned(batch_size=4)
