"""What the tests on a GPU share: stores, checks of batches, the memory in use, and a step of ``gpu_steps``."""

import gc
from collections import deque

import torch
from damage import write_store
from gpu_steps.decoding import decoder_log, largest_batches
from image_sets import record_of
from pictures import KINDS, picture
from PIL import Image

from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD, TrainTransform


def store_of_pictures(path):
    """A store of 24 pictures that look like photos, in every kind of file in turn, most of them JPEG."""
    encode = [KINDS["progressive jpeg"], KINDS["grey jpeg"], KINDS["png"], KINDS["cmyk jpeg"]]
    values, sizes = [], []
    for seed in range(24):
        image = Image.fromarray(picture(seed))
        values.append(encode[seed // 4](image) if seed % 4 == 0 and seed < 16 else KINDS["plain jpeg"](image))
        sizes.append((image.height, image.width))
    return write_store(path, values, sizes=sizes)


def store_of_giants(path, *, num_records, size=(3000, 4000)):
    """A store of large JPEGs, 12 megapixels by default."""
    values = [
        KINDS["plain jpeg"](Image.fromarray(picture(seed)).resize(size[::-1])) for seed in range(num_records)
    ]
    return write_store(path, values, sizes=[size] * num_records)


def grey_levels(images):
    """Normalised images as grey levels, on the CPU."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float().cpu() * std + mean) * 255


def records_of(batch):
    """The records a batch of grey images shows; pixels, labels and indices must agree on them."""
    images, labels, records = batch
    greys = grey_levels(images)
    assert greys.flatten(1).std(dim=1).max() < 2
    assert [record_of(grey) for grey in greys.mean(dim=(1, 2, 3))] == records.tolist()
    assert labels.tolist() == records.tolist()
    return records.tolist()


def by_record(batches):
    """The images of some batches on the CPU by record, as copies."""
    return {
        int(record): image.clone()
        for images, _, records in batches
        for record, image in zip(records, images.float().cpu(), strict=True)
    }


def assert_alike(ours, theirs, *, mean, share):
    """Bounds of the mean difference in grey levels, and of the share of values within 8.

    Wider than between the two CPU backends: nvJPEG and libjpeg-turbo round differently.
    """
    assert ours.keys() == theirs.keys()
    found = torch.stack([(ours[record] - theirs[record]).abs() for record in theirs])
    assert found.mean() < mean
    assert (found <= 8).float().mean() > share


def used_bytes():
    """Memory in use on the GPU, apart from what torch keeps for later."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def drain(loader):
    """One epoch, of which nothing is kept."""
    deque(loader, maxlen=0)


def resumed_batches(store, device, batch_size, positions):
    """The most images of a batch that the hardware engine takes, in runs from some positions of an epoch on."""
    for position in positions:
        with (
            DaliLoader(
                store,
                transform=TrainTransform(size=32),
                device=device,
                batch_size=batch_size,
                last_batch="short",
                hw_decoder_load=1.0,
            ) as loader,
            decoder_log() as log,
        ):
            loader.load_state_dict(loader.state_dict() | {"position": position})
            sizes = [len(labels) for _ in range(2) for _, labels in loader]
        yield {"sizes": sizes, "largest": largest_batches(log())}
