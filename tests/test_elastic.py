"""Runs that are stopped and go on with other numbers of ranks and other batch sizes, all ranks in one process."""

import io
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from classic_databases import make_classic
from image_sets import save_noise
from PIL import Image
from torchvision.transforms import functional as F

from dali_lmdb.convert import convert
from dali_lmdb.loaders.base import Batch, Loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.settings import LoaderSettings
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import TrainTransform
from dali_lmdb.plan.order import epoch_order
from dali_lmdb.store import open_store

NUM_RECORDS = 61
WORLD_SIZES = (8, 3, 5, 1)
TRANSFORM = TrainTransform(size=8, brightness=0.4, erase=0.5)
SEED = 6


class PlansOnly(Loader):
    """The place-keeping of every loader, with windows and flips, not pixels, for images."""

    def __init__(self, store, *, batch_size, rank, world_size, last_batch, shuffle="full"):
        super().__init__(
            store,
            LoaderSettings(
                transform=TRANSFORM,
                batch_size=batch_size,
                device="cpu",
                rank=rank,
                world_size=world_size,
                seed=SEED,
                shuffle=shuffle,
                sampler=None,
                weights=None,
                last_batch=last_batch,
                dtype="float32",
                layout="NCHW",
                on_bad="raise",
                quarantine=None,
                return_index=True,
            ),
        )

    def _batch_at(self, epoch, position):
        plan = self.planner.plan(epoch, position)
        return Batch(
            torch.from_numpy(choices(self.planner.augment(plan))),
            torch.from_numpy(self.planner.labels(plan)),
            torch.from_numpy(plan.records),
            plan.end,
            num_bytes=0,
        )

    def _queue_fill(self):
        return 0


def choices(augmentation):
    """Everything that was chosen for each record, a row each."""
    columns = [np.asarray(column, np.float64).reshape(len(column), -1) for column in augmentation]
    return np.concatenate(columns, axis=1)


def dali(store, **arguments):
    return DaliLoader(store, **arguments, **SAME, device="cpu", num_threads=1)


def pillow(store, **arguments):
    return TorchLoader(store, **SAME | {"num_workers": 0} | arguments)


SAME = {"transform": TRANSFORM, "seed": SEED, "dtype": "uint8", "return_index": True}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same records as one file, as shards and as a classic database."""
    root = tmp_path_factory.mktemp("elastic")
    for number in range(NUM_RECORDS):
        folder = root / "images" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        save_noise(folder / f"{number:02}.jpg", seed=number, size=(16 + number % 9, 24 - number % 7))
    convert(root / "images", root / "one.lmdb")
    convert(root / "images", root / "shards.lmdb", shards=4)
    with open_store(root / "one.lmdb") as store:
        records = [(bytes(store.read(i)), int(store.labels[i])) for i in range(len(store))]
    make_classic(root / "classic.lmdb", records)
    return {kind: root / f"{kind}.lmdb" for kind in ("one", "shards", "classic")}


class Group:
    """All ranks of a run, one loader each, in step with each other."""

    def __init__(self, make, *, world_size, state=None, **arguments):
        self.loaders = [make(rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
        for loader in self.loaders:
            if state is not None:
                loader.load_state_dict(state)
        self.iterators = [iter(loader) for loader in self.loaders]

    def step(self):
        """{record: image} of each rank in the next global step; nothing at the end of an epoch."""
        batches = [next(iterator, None) for iterator in self.iterators]
        if not any(batches):
            self.iterators = [iter(loader) for loader in self.loaders]
        return [
            (record, image.clone())
            for images, _, records in filter(None, batches)
            for record, image in zip(records.tolist(), images, strict=True)
        ]

    def state(self):
        """As it comes back from a checkpoint; of the last rank, which takes part in every step."""
        return json.loads(json.dumps(self.loaders[-1].state_dict()))

    def close(self):
        for loader in self.loaders:
            loader.close()


def run_through(make, *, last_batch, random, most_steps, num_epochs=1):
    """Train on ``num_epochs`` epochs, with another number of ranks and batch size after some steps.

    Returns:
        [(record, image), ...] of each epoch in the order shown, and the most records that its last step, or one
        that does not fit any more, could have left over or shown twice.
    """
    epochs, endings = [[] for _ in range(num_epochs)], []
    state, padded = None, 0
    for world_size in itertools.cycle(WORLD_SIZES):
        batch_size = int(random.integers(1, NUM_RECORDS // world_size + 1))
        group = Group(make, world_size=world_size, batch_size=batch_size, state=state, last_batch=last_batch)
        # The last of the world sizes goes on to the end, if there is only one epoch to see.
        steps = 10**9 if world_size == WORLD_SIZES[-1] and num_epochs == 1 else int(random.integers(most_steps))
        for _ in range(steps):
            shown = group.step()
            epochs[len(endings)] += shown
            if shown:
                padded = world_size * batch_size
            else:
                endings.append(padded if last_batch == "pad" else world_size * batch_size)
                if len(endings) == num_epochs:
                    group.close()
                    return epochs, endings
        state = group.state()
        group.close()
    raise AssertionError


def check_records(shown, order, *, last_batch, global_batch_size):
    """Whether an epoch's records are those that ``last_batch`` says, in any order within a step."""
    records = Counter(record for record, _ in shown)
    if last_batch == "short":
        assert records == Counter(order)
    elif last_batch == "drop":
        assert records == Counter(order[: len(shown)])
        assert 0 <= len(order) - len(shown) < global_batch_size
    else:
        again = len(shown) - len(order)
        assert records == Counter(order) + Counter(np.resize(order, again).tolist() if again else ())
        assert 0 <= again < global_batch_size


@pytest.mark.parametrize("last_batch", ["drop", "pad", "short"])
@pytest.mark.parametrize("shuffle", ["full", "none"])
@pytest.mark.parametrize("kind", ["one", "shards", "classic"])
def test_runs_that_are_cut_anywhere_show_each_record_as_an_uncut_one(stores, kind, shuffle, last_batch):
    random = np.random.default_rng(1)
    with open_store(stores[kind]) as store:
        heights, widths = store.column("height"), store.column("width")
        for _ in range(12):

            def make(**arguments):
                return PlansOnly(store, shuffle=shuffle, **arguments)

            epochs, endings = run_through(make, last_batch=last_batch, random=random, most_steps=9, num_epochs=3)
            for epoch, (shown, ending) in enumerate(zip(epochs, endings, strict=True)):
                order = epoch_order(NUM_RECORDS, seed=SEED, epoch=epoch, shuffle=shuffle)
                order = order(np.arange(NUM_RECORDS)).tolist()
                check_records(shown, order, last_batch=last_batch, global_batch_size=ending)
                every = np.arange(NUM_RECORDS)
                expected = choices(TRANSFORM.augment(every, heights, widths, seed=SEED, epoch=epoch))
                for record, chosen in shown:
                    assert np.array_equal(chosen, expected[record])


@pytest.fixture(scope="module")
def uncut(stores):
    """Images of an epoch of a run that was not stopped, by record."""
    images = {}
    for backend in (dali, pillow):
        with backend(stores["one"], batch_size=NUM_RECORDS, last_batch="short") as loader:
            ((batch, _, records),) = list(loader)
            images[backend] = dict(zip(records.tolist(), batch.clone(), strict=True))
    return images


@pytest.mark.parametrize("last_batch", ["drop", "pad", "short"])
@pytest.mark.parametrize("kind", ["one", "shards", "classic"])
@pytest.mark.parametrize("backend", [dali, pillow])
def test_a_cut_run_has_the_pixels_of_an_uncut_one(stores, uncut, backend, kind, last_batch):
    random = np.random.default_rng(len(kind) + len(last_batch))

    def make(**arguments):
        return backend(store, **arguments)

    with open_store(stores[kind]) as store:
        (shown,), (ending,) = run_through(make, last_batch=last_batch, random=random, most_steps=3)
    order = epoch_order(NUM_RECORDS, seed=SEED, epoch=0, shuffle="full")(np.arange(NUM_RECORDS)).tolist()
    check_records(shown, order, last_batch=last_batch, global_batch_size=ending)
    for record, image in shown:
        assert torch.equal(image, uncut[backend][record]), record


def test_the_uncut_run_has_the_planned_windows(stores, uncut):
    """Noise shows any other window: the planned one, cut out and resized by Pillow, is near, the next one far."""
    plain = TrainTransform(size=8)
    with open_store(stores["one"]) as store:
        heights, widths = store.column("height"), store.column("width")
        with pillow(store, transform=plain, batch_size=NUM_RECORDS, last_batch="short") as loader:
            ((images, _, records),) = list(loader)
        every = np.arange(NUM_RECORDS)
        planned = plain.augment(every, heights, widths, seed=SEED, epoch=0)
        for image, record in zip(images, records.tolist(), strict=True):
            whole = Image.open(io.BytesIO(store.read(record))).convert("RGB")
            window = *planned.anchors[record].tolist(), *planned.shapes[record].tolist()
            cut = F.resized_crop(whole, *window, [8, 8])
            assert torch.equal(image, F.pil_to_tensor(F.hflip(cut) if planned.mirror[record] else cut))
