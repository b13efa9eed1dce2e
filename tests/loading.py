"""What the tests of the loaders share: the backends, and checks of the batches they make."""

import pytest
import torch
from image_sets import record_of

from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform
from dali_lmdb.plan.order import StepPlan, epoch_order

TRAIN = TrainTransform(size=16)
EVAL = EvalTransform(size=16, resize=18)
NUM_RECORDS = 24


def dali_on_the_cpu(data, **arguments):
    return DaliLoader(data, **{"device": "cpu", "num_threads": 1} | arguments)


def dali_on_the_gpu(data, **arguments):
    """With the CUDA decoder alone, whose pixels do not depend on the batch: the hardware engine rounds otherwise,
    and the batch decides which images it takes."""
    return DaliLoader(data, **{"device": "cuda", "num_threads": 2, "hw_decoder_load": 0.0} | arguments)


def torch_here(data, **arguments):
    return TorchLoader(data, **{"num_workers": 0} | arguments)


def torch_in_workers(data, **arguments):
    return TorchLoader(data, **{"num_workers": 1} | arguments)


BACKENDS = {
    "dali": dali_on_the_cpu,
    "dali-gpu": dali_on_the_gpu,
    "torch": torch_here,
    "torch-workers": torch_in_workers,
}
DALI = pytest.param(dali_on_the_cpu, id="dali")
GPU = pytest.param(dali_on_the_gpu, id="dali-gpu", marks=pytest.mark.gpu)
TORCH = pytest.param(torch_here, id="torch")
WORKERS = pytest.param(torch_in_workers, id="torch-workers")


def greys(images, transform=TRAIN):
    """The grey level of each image of a normalised batch; checks that it is one."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (transform.mean, transform.std))
    pixels = (images.float().cpu() * std + mean) * 255
    assert pixels.flatten(1).std(dim=1).max() < 2
    return pixels.mean(dim=(1, 2, 3)).tolist()


def epoch_of(loader):
    """Records of one epoch, a list for each step; checks that pixels, labels and records belong together."""
    all_labels = loader.store.labels
    steps = []
    for images, labels, records in loader:
        assert [record_of(grey) for grey in greys(images, loader.planner.transform)] == records.tolist()
        assert labels.tolist() == all_labels[records.numpy()].tolist()
        assert len(images) == len(labels) == len(records)
        steps.append(records.tolist())
    return steps


def flat(steps):
    return [record for step in steps for record in step]


def planned(*, epoch=0, start=0, seed=0, shuffle="full", **steps):
    plan = StepPlan(num_positions=NUM_RECORDS, **steps)
    order = epoch_order(NUM_RECORDS, seed=seed, epoch=epoch, shuffle=shuffle)
    records = []
    while (positions := plan.positions(start)) is not None:
        records.append(order(positions).tolist())
        start = plan.end_of_step(start)
    return records


def cut_short(iterator, *, because):
    """Check that an iterator says, every time, why its epoch ended after one step."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"epoch 0 was cut short at position 4 of 24: {because}"):
            next(iterator)


def images_by_record(loader, *, epoch=0):
    loader.set_epoch(epoch)
    return {
        record: image
        for images, _, records in loader
        for record, image in zip(records.tolist(), images.clone().cpu(), strict=True)
    }
