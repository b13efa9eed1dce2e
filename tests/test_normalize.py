"""Normalising on the device what a loader gives as uint8."""

from functools import partial

import pytest
import torch
from torch import nn

from dali_lmdb import DaliLoader, EvalTransform, Normalize, TorchLoader


@pytest.mark.parametrize("loader", [DaliLoader, partial(TorchLoader, num_workers=0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_the_result_is_that_of_a_loader_that_normalises(store_path, dtype, tolerance, loader):
    transform = EvalTransform(size=24, resize=30, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    arguments = {"transform": transform, "batch_size": 4, "device": "cpu"}
    normalize = Normalize(transform.mean, transform.std, dtype=getattr(torch, dtype))
    with (
        loader(store_path, dtype=dtype, **arguments) as normalised,
        loader(store_path, dtype="uint8", **arguments) as raw,
    ):
        for (expected, _), (images, _) in zip(normalised, raw, strict=True):
            torch.testing.assert_close(normalize(images), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_memory_format_is_that_of_the_images_unless_another_is_asked_for(store_path, layout):
    with DaliLoader(
        store_path,
        transform=EvalTransform(size=24, resize=30),
        batch_size=4,
        device="cpu",
        dtype="uint8",
        layout=layout,
    ) as loader:
        images, _ = next(iter(loader))
    kept = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    assert Normalize()(images).is_contiguous(memory_format=kept)
    for asked in (torch.channels_last, torch.contiguous_format):
        assert Normalize(memory_format=asked)(images).is_contiguous(memory_format=asked)
        assert torch.equal(Normalize(memory_format=asked)(images), Normalize()(images))


def test_it_adds_nothing_to_a_checkpoint_and_moves_with_the_model():
    model = nn.Sequential(Normalize(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert list(model.state_dict()) == ["2.weight", "2.bias"]
    assert model.to("meta")[0].mean.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_stays_exact_in_a_model_of_another_dtype(dtype):
    images = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8)
    model = nn.Sequential(Normalize(dtype=dtype), nn.Identity()).to(dtype)
    assert torch.equal(model(images), Normalize(dtype=dtype)(images))


def test_images_that_are_normalised_already_are_refused():
    with pytest.raises(TypeError, match=r"^images are torch.float32, expected torch.uint8"):
        Normalize()(torch.zeros(1, 3, 2, 2))


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"std above 0"):
        Normalize(std=(0.2, 0.0, 0.2))
