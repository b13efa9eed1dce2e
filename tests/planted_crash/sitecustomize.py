"""Faults and witnesses in a training process, by way of PYTHONPATH.

``PLANTED_CRASH``: the label of a record; the process crashes when DALI gets it.
``PLANTED_RECORDS``: a file to which a line is added for each batch that a loader hands out: its labels, the place
after that step of all ranks, the number of records of such a step, and ``PLANTED_START``.
``PLANTED_SIGTERM``: a rank that sends itself SIGTERM when it gets the first batch of an evaluation.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys


class _Planter(importlib.abc.MetaPathFinder):
    """Patches a module when it is first imported."""

    def __init__(self, name, plant):
        self._name, self._plant = name, plant

    def find_spec(self, name, path, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            self._plant(module)

        spec.loader.exec_module = exec_module
        return spec


def _plant_crash(module):
    import numpy as np

    define, label = module.define_pipeline, int(os.environ["PLANTED_CRASH"])

    def define_pipeline(source, settings):
        def crash(info):
            feed = encoded, labels, *_ = source(info)
            if any(labels[row] == label and np.asarray(encoded[row]).size for row in range(len(labels))):
                os.kill(os.getpid(), signal.SIGSEGV)
            return feed

        return define(crash, settings)

    module.define_pipeline = define_pipeline


def _plant_records(module):
    handed_out = module.Loader.__iter__
    start = f"{os.environ['PLANTED_START']}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def iterate(self):
        for images, labels in handed_out(self):
            place, training = self.state_dict(), self.settings.is_training
            line = {"start": start, "training": training, "epoch": place["epoch"], "end": place["position"]}
            line |= {"num_records": self.planner.steps.global_batch_size, "labels": labels.tolist()}
            with open(os.environ["PLANTED_RECORDS"], "a") as file:
                file.write(json.dumps(line) + "\n")
            if not training and os.environ.get("RANK") == os.environ.pop("PLANTED_SIGTERM", "none"):
                os.kill(os.getpid(), signal.SIGTERM)
            yield images, labels
            del images, labels  # the pipeline needs their memory for the next batch

    module.Loader.__iter__ = iterate


if "PLANTED_CRASH" in os.environ:
    sys.meta_path.insert(0, _Planter("dali_lmdb.loaders.pipeline", _plant_crash))
if "PLANTED_RECORDS" in os.environ:
    sys.meta_path.insert(0, _Planter("dali_lmdb.loaders.base", _plant_records))
