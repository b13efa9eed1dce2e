"""Settings of DALI graphs, for the tests that define graphs or compute with their settings."""

from dali_lmdb.loaders.pipeline import GraphSettings
from dali_lmdb.plan.augment import EvalTransform, TrainTransform

COLOR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}
TRANSFORMS = {
    "train": TrainTransform(),
    "eval": EvalTransform(),
    "color": TrainTransform(**COLOR),
    "erase": TrainTransform(erase=0.25),
    "jitter": TrainTransform(**COLOR, erase=0.25),
}


def settings(device="cuda", transform="train", **changes):
    return GraphSettings(
        **{
            "transform": TRANSFORMS[transform],
            "batch_size": 64,
            "device": device,
            "device_id": 0 if device == "cuda" else None,
            "num_threads": 3,
            "prefetch_queue_depth": 2,
            "dtype": "float16",
            "layout": "NHWC",
            "hw_decoder_load": 0.7,
            "decode": "image" if device == "cuda" else "window",
            "decode_device": "gpu" if device == "cuda" else "cpu",
            "fancy_upsampling": True,
            "resize": "dali",
            "decode_scale": "exact",
            "height_hint": 500,
            "width_hint": 600,
            "device_memory_padding": 16 << 20,
            "host_memory_padding": 8 << 20,
        }
        | changes
    )
