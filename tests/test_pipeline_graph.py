import itertools
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from graphs import TRANSFORMS, settings
from nvidia.dali import types

from dali_lmdb.loaders.pipeline import build_pipeline, define_pipeline
from dali_lmdb.loaders.probe import Probe
from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD, TrainTransform


class Operator(NamedTuple):
    name: str
    device: str
    inputs: list[str]
    """``OPERATOR_NUMBER_DEVICE`` of each input, in order."""
    outputs: list[str]
    arguments: dict[str, str]


def operator_of(spec):
    """An operator from the text of its specification, all that DALI shows of it."""
    head, inputs, outputs, arguments = re.fullmatch(
        r"OpSpec for (\w+):\n  Inputs:\n(.*?)  Outputs:\n(.*?)  Arguments:\n(.*)", str(spec), re.DOTALL
    ).groups()
    values = dict(re.findall(r"^    (\w+): (.*)$", arguments, re.MULTILINE))
    return Operator(head, values["device"], inputs.split(), outputs.split(), values)


class Graph:
    """The operators that a pipeline's outputs depend on."""

    def __init__(self, pipeline):
        self.outputs = list(pipeline._graph_out)
        self.sources = {}
        pending = [node.source for node in self.outputs]
        while pending:
            instance = pending.pop()
            if instance.id in self.sources:
                continue
            self.sources[instance.id] = instance
            pending += [node.source for node in instance.inputs]
        self.operators = [operator_of(instance.spec) for instance in self.sources.values()]

    def named(self, name):
        (operator,) = [operator for operator in self.operators if operator.name == name]
        return operator

    def way_of_the_images(self):
        """Operators from the decoder to the output, in order."""
        way = [self.outputs[0].source]
        while way[0].inputs:
            way.insert(0, way[0].inputs[0].source)
        return [operator_of(instance.spec) for instance in way]


def graph_of(*arguments, **changes):
    return Graph(define_pipeline(lambda info: None, settings(*arguments, **changes)))


def numbers(text):
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


DECODERS = {"image": ["decoders__Image", "Slice"], "window": ["decoders__ImageSlice"]}
MAYBE = {"train": [], "eval": [], "color": ["ColorTwist"], "erase": ["Erase"], "jitter": ["ColorTwist", "Erase"]}
DEVICES = [("cuda", "gpu"), ("cuda", "cpu"), ("cpu", "cpu")]  # and where they decode


@pytest.mark.parametrize(("device", "decode_device"), DEVICES)
@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    ("transform", "dtype", "layout"),
    list(itertools.product(TRANSFORMS, ["float32", "float16", "uint8"], ["NHWC", "NCHW"])),
)
def test_every_graph_is_of_these_operators_on_these_devices(
    device, decode_device, decode, transform, dtype, layout
):
    graph = graph_of(device, transform, decode=decode, decode_device=decode_device, dtype=dtype, layout=layout)
    decoders = DECODERS[decode]
    after = ["Resize", *MAYBE[transform], "CropMirrorNormalize"]
    decoder_devices = ["mixed", "gpu"] if decode_device == "gpu" else ["cpu", "cpu"]
    devices = ["cpu", *decoder_devices[: len(decoders)], *["gpu" if device == "cuda" else "cpu"] * len(after)]
    devices.insert(1, "cpu")
    names = ["ExternalSource", "Reshape", *decoders, *after]
    way = graph.way_of_the_images()
    assert [(operator.name, operator.device) for operator in way] == list(zip(names, devices, strict=True))
    # Besides, there are only the numbers of the plan, which the host makes, and the check of headers and windows.
    others = [operator for operator in graph.operators if operator not in way[1:]]
    assert {operator.device for operator in others} == {"cpu"}
    checking = {"PeekImageShape", "_TensorSubscript", "_ArithmeticGenericOp", "Cast"}
    assert {operator.name for operator in others} == {"ExternalSource"} | checking
    # Pixels never come back: each operator's first input is the one before's output, on the GPU once it was there,
    # and as a copy there for the first operator on the GPU after those on the CPU.
    for before, operator in itertools.pairwise(way):
        on_gpu = before.device in ("mixed", "gpu") or operator.device == "gpu"
        assert operator.inputs[0] == re.sub("_[cg]pu$", "_gpu" if on_gpu else "_cpu", before.outputs[0])


def test_images_and_labels_come_out_on_the_gpu():
    assert [node.device for node in graph_of("cuda").outputs] == ["gpu", "gpu"]


@pytest.mark.parametrize(("device", "decode_device"), DEVICES)
@pytest.mark.parametrize("decode", DECODERS)
def test_the_planned_window_is_decoded_or_cut_out_as_rgb_with_exif_orientation_left_alone(
    device, decode_device, decode
):
    graph = graph_of(device, decode=decode, decode_device=decode_device)
    decoder, window = (graph.named(DECODERS[decode][place]) for place in (0, -1))
    assert len(window.inputs) == 3  # bytes or pixels, start, shape
    assert numbers(window.arguments["axes"]) == [0, 1]
    assert decoder.arguments["output_type"] == str(int(types.RGB))
    assert decoder.arguments["adjust_orientation"] == "False"


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("fancy_upsampling", [True, False])
def test_the_gpu_decoder_is_told_what_it_needs_to_know(decode, fancy_upsampling):
    graph = graph_of("cuda", decode=decode, hw_decoder_load=0.25, fancy_upsampling=fancy_upsampling)
    arguments = graph.named(DECODERS[decode][0]).arguments
    assert arguments["jpeg_fancy_upsampling"] == str(fancy_upsampling)
    assert float(arguments["hw_decoder_load"]) == 0.25
    assert (arguments["preallocate_height_hint"], arguments["preallocate_width_hint"]) == ("500", "600")
    assert int(arguments["device_memory_padding"]) == 16 << 20
    assert int(arguments["host_memory_padding"]) == 8 << 20


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("decode", DECODERS)
def test_the_cpu_decoder_gets_no_arguments_of_the_gpu(device, decode):
    arguments = graph_of(device, decode=decode, decode_device="cpu").named(DECODERS[decode][0]).arguments
    assert not {
        name for name in arguments if name.startswith(("hw_", "preallocate", "jpeg_fancy", "device_m", "host_m"))
    }


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_resizing_is_linear_and_antialiased_as_torchvisions(device):
    arguments = graph_of(device).named("Resize").arguments
    assert arguments["interp_type"] == str(int(types.INTERP_LINEAR))
    assert arguments["antialias"] == "True"


@pytest.mark.parametrize(
    ("interpolation", "expected"),
    [
        ("nearest", types.INTERP_NN),
        ("linear", types.INTERP_LINEAR),
        ("cubic", types.INTERP_CUBIC),
        ("lanczos", types.INTERP_LANCZOS3),
    ],
)
def test_the_interpolation_is_the_transforms(interpolation, expected):
    with_it = replace(settings("cuda"), transform=TrainTransform(interpolation=interpolation))
    graph = Graph(define_pipeline(lambda info: None, with_it))
    assert graph.named("Resize").arguments["interp_type"] == str(int(expected))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("dtype", "dali_dtype"), [("float32", types.FLOAT), ("float16", types.FLOAT16), ("uint8", types.UINT8)]
)
@pytest.mark.parametrize(("layout", "dali_layout"), [("NHWC", "HWC"), ("NCHW", "CHW")])
def test_the_output_is_of_the_asked_type_and_layout(device, dtype, dali_dtype, layout, dali_layout):
    arguments = graph_of(device, dtype=dtype, layout=layout).named("CropMirrorNormalize").arguments
    assert arguments["dtype"] == str(int(dali_dtype))
    assert arguments["output_layout"] == dali_layout


def test_floats_are_normalised_as_torchvision_does_and_bytes_are_not():
    arguments = graph_of("cuda").named("CropMirrorNormalize").arguments
    assert np.allclose(numbers(arguments["mean"]), [255 * value for value in IMAGENET_MEAN])
    assert np.allclose(numbers(arguments["std"]), [255 * value for value in IMAGENET_STD])
    arguments = graph_of("cuda", dtype="uint8").named("CropMirrorNormalize").arguments
    assert (set(numbers(arguments["mean"])), set(numbers(arguments["std"]))) == ({0.0}, {1.0})


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_rectangles_are_erased_before_normalising_with_whole_numbers(device, dtype):
    graph = graph_of(device, "jitter", dtype=dtype)
    assert numbers(graph.named("Erase").arguments["fill_value"]) == [124, 116, 104]
    assert graph.named("CropMirrorNormalize").inputs[0] == graph.named("Erase").outputs[0]


def test_no_operator_draws_random_numbers():
    """DALI's own key on the place in the batch; every choice comes from the plan."""
    for transform, decode in itertools.product(TRANSFORMS, DECODERS):
        for operator in graph_of("cuda", transform, decode=decode).operators:
            assert "random" not in operator.name.lower()
            assert operator.name not in ("CoinFlip", "Uniform", "decoders__ImageRandomCrop")
            assert not {"seed", "probability"} & set(operator.arguments)


def test_the_source_hands_over_without_a_copy_in_whole_batches():
    sources = [operator for operator in graph_of("cuda").operators if operator.name == "ExternalSource"]
    assert all(operator.arguments["no_copy"] == "True" for operator in sources)
    assert all(operator.arguments["repeat_last"] == "False" for operator in sources)


def test_colour_and_erasing_are_in_the_graph_only_if_asked_for():
    names = {operator.name for operator in graph_of("cuda", "train").operators}
    assert not names & {"ColorTwist", "Erase"}


def test_the_pipeline_is_as_large_as_asked():
    pipeline = define_pipeline(lambda info: None, settings("cuda"))
    assert pipeline.max_batch_size == 64
    assert pipeline.num_threads == 3
    assert pipeline.device_id == 0


def test_the_cpu_pipeline_has_no_device():
    pipeline = build_pipeline(lambda info: None, settings("cpu"))
    assert pipeline.device_id is None


@pytest.mark.gpu
@pytest.mark.parametrize("decode_device", ["gpu", "cpu"])
@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_the_gpu_pipeline_builds(transform, dtype, layout, decode, decode_device):
    changes = {"dtype": dtype, "layout": layout, "decode": decode, "decode_device": decode_device}
    build_pipeline(lambda info: None, settings("cuda", transform, **changes))


def test_a_record_is_probed_on_both_ways_through_the_gpu():
    assert [one.hw_decoder_load for one in Probe(settings("cuda")).ways] == [1.0, 0.0]
    assert len(Probe(settings("cpu")).ways) == 1
