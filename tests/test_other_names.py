"""Names and objects of torch and torchvision, where the package has names of its own."""

import pytest
import torch
from loading import EVAL, TRAIN
from PIL.Image import Resampling
from torchvision.transforms import Compose, InterpolationMode

from dali_lmdb.errors import DeviceError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.dataset import ImageFolderLMDB
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform


@pytest.mark.parametrize("transform", [TrainTransform, EvalTransform])
def test_interpolations_have_torchvisions_names_too(transform):
    for kind in (InterpolationMode, Resampling):
        for name, ours in (("bilinear", "linear"), ("bicubic", "cubic"), ("nearest", "nearest"), ("lanczos",) * 2):
            assert transform(interpolation=name) == transform(interpolation=ours)
            assert transform(interpolation=kind[name.upper()]) == transform(interpolation=ours)
    for wrong in ("box", InterpolationMode.BOX, InterpolationMode.NEAREST_EXACT):
        with pytest.raises(ValueError, match=r"interpolation is .*, expected one of 'nearest', 'linear'"):
            transform(interpolation=wrong)


@pytest.mark.parametrize("kind", [DaliLoader, TorchLoader])
def test_devices_may_be_torchs(kind, store_path):
    for device in (torch.device("cpu"), "cpu:0"):
        with kind(store_path, transform=EVAL, batch_size=24, device=device) as loader:
            images, labels = next(iter(loader))
        assert images.device == labels.device == torch.device("cpu")
    for wrong in ("cuda:x", "mps", torch.device("meta"), None, False):
        with pytest.raises(ValueError, match=r"device is .*, expected 'cuda', 'cuda:N' or 'cpu'"):
            kind(store_path, transform=EVAL, batch_size=24, device=wrong)
    if not torch.cuda.is_available():
        for gpu in ("cuda:0", torch.device("cuda"), torch.device("cuda", 1)):
            with pytest.raises(DeviceError, match=f"device '{gpu}': no usable GPU found"):
                kind(store_path, transform=EVAL, batch_size=24, device=gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [DaliLoader, TorchLoader])
def test_a_gpu_may_be_named_by_its_number(kind, store_path):
    for device in ("cuda:0", torch.device("cuda", 0)):
        with kind(store_path, transform=EVAL, batch_size=24, device=device) as loader:
            images, labels = next(iter(loader))
        assert images.device == labels.device == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=r"device 'cuda:99': only GPUs 0 to \d+ found"):
        kind(store_path, transform=EVAL, batch_size=24, device="cuda:99")


@pytest.mark.parametrize("kind", [DaliLoader, TorchLoader])
def test_a_loader_takes_a_data_set(kind, store_path):
    data = ImageFolderLMDB(store_path, transform=Compose([]))
    arguments = {"transform": TRAIN, "batch_size": 24, "device": "cpu"}
    with kind(data, **arguments) as ours, kind(store_path, **arguments) as theirs:
        for one, other in zip(*(next(iter(loader)) for loader in (ours, theirs)), strict=True):
            assert torch.equal(one, other)
    changed = ImageFolderLMDB(store_path)
    changed.samples = changed.samples[:9]
    for other in (
        changed,
        ImageFolderLMDB(store_path, target_transform=str),
        ImageFolderLMDB(store_path, is_valid_file=lambda name: name.startswith("ant"), allow_empty=True),
    ):
        with pytest.raises(ValueError, match="has not all records of its store, or other labels"):
            kind(other, **arguments)
