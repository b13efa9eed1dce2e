"""Read a store with both loaders and transforms; `python attack_loaders.py STORE` prints what they say as JSON.

``bad``: the cause by name of each record that a loader calls bad; ``pixels``: a checksum of each of the others, as
evaluation with DALI shows it.
"""

import json
import sys
import zlib

from dali_lmdb import DaliLoader, EvalTransform, RecordError, TorchLoader, TrainTransform

EVAL = EvalTransform(size=32, resize=36)
BACKENDS = {"dali": (DaliLoader, {"device": "cpu", "num_threads": 2}), "torch": (TorchLoader, {"num_workers": 0})}


def epoch_of(loader):
    """(record, its image) of one epoch; steps without a good record are left out."""
    steps = iter(loader)
    for _ in range(len(loader)):
        try:
            images, _, records = next(steps)
        except RecordError:
            continue
        yield from zip(records.tolist(), images.numpy(), strict=True)


def main(path):
    bad, pixels = {}, {}
    options = {"batch_size": 64, "last_batch": "short", "on_bad": "substitute", "return_index": True}
    for backend, (kind, more) in BACKENDS.items():
        for transform in (TrainTransform(size=32), EVAL):
            what = f"{backend} {type(transform).__name__}"
            print(what, file=sys.stderr, flush=True)  # the last line tells what killed the process
            with kind(path, transform=transform, **options, **more) as loader:
                images = epoch_of(loader)
                if (backend, transform) == ("dali", EVAL):
                    pixels = {loader.store.name(record): zlib.crc32(image.tobytes()) for record, image in images}
                else:
                    for _ in images:
                        pass
                bad |= {record.name: f"{what}: {record.cause}" for record in loader.bad_records}
    print(json.dumps({"bad": bad, "pixels": pixels}))


if __name__ == "__main__":
    main(sys.argv[1])
