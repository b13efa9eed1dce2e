"""The classic way as projects write it by hand, after PyTorch-LMDB: the peer of ``TorchLoader``."""

from __future__ import annotations

import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import lmdb
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler
from torchvision import transforms

from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD
from dali_lmdb.store import Store

__all__ = ["ImageFolderLMDB", "plain_loader", "write_plain"]


class ImageFolderLMDB(Dataset[tuple[Any, int]]):
    """Pickled (image file, label) pairs."""

    def __init__(self, path: Path, transform: Any) -> None:
        self.env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
        with self.env.begin() as txn:
            self.keys = pickle.loads(txn.get(b"__keys__", b""))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with self.env.begin() as txn:
            raw, label = pickle.loads(txn.get(self.keys[index], b""))
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        return self.transform(image), label


def write_plain(images: Store, path: Path) -> None:
    """Write a database that ``ImageFolderLMDB`` reads."""
    keys = [str(record).encode() for record in range(len(images))]
    with lmdb.open(str(path), subdir=False, map_size=1 << 40) as env, env.begin(write=True) as txn:
        for record, label in enumerate(images.labels.tolist()):
            txn.put(keys[record], pickle.dumps((bytes(images.read(record)), label)))
        txn.put(b"__keys__", pickle.dumps(keys))


def plain_loader(
    path: Path, *, is_training: bool, batch_size: int, num_workers: int, num_batches: int
) -> DataLoader[tuple[Any, int]]:
    """A ``DataLoader`` over a database, with one long epoch of some batches."""
    if is_training:
        augment = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    else:
        augment = [transforms.Resize(256), transforms.CenterCrop(224)]
    to_float = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    dataset = ImageFolderLMDB(path, transforms.Compose([*augment, *to_float]))
    sampler: Sampler[int] | Any
    if is_training:
        sampler = RandomSampler(dataset, num_samples=num_batches * batch_size)
    else:
        sampler = itertools.islice(itertools.cycle(range(len(dataset))), num_batches * batch_size)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)
