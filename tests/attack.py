"""Put damaged images through every command and both loaders, and report what kills, hangs or leaves a traceback.

`python attack.py FOLDER --cases 20000` works in FOLDER, keeps what failed in FOLDER/culprits and ends with exit
code 1 if there is any. Each image depends on --seed and its number alone: `--first 123 --cases 1` repeats one.
"""

import argparse
import ctypes.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import corpus, mutant

HERE = Path(__file__).resolve().parent
LOADERS = [sys.executable, str(HERE / "attack_loaders.py"), "STORE"]
MALLOC_CHECKS = ctypes.util.find_library("c_malloc_debug")  # part of the C library itself before glibc 2.34
FEW, MOST_CULPRITS = 60, 4  # images for commands that take long; culprits to find in one group with one attack


def dali_lmdb(*arguments):
    return [sys.executable, "-m", "dali_lmdb", *arguments]


def convert(*options):
    return dali_lmdb("convert", "SOURCE", "STORE", *options)


_TRAINING = ("--device", "cpu", "--size", "32", "--workers", "1")
ATTACKS = {
    "header": [
        convert("--on-bad", "skip"),
        dali_lmdb("info", "STORE"),
        dali_lmdb("verify", "STORE", "--decode"),
        dali_lmdb("export", "STORE", "OUT"),
        LOADERS,
    ],
    "none": [
        convert("--check", "none"),
        dali_lmdb("info", "STORE"),
        dali_lmdb("verify", "STORE", "--decode"),
        dali_lmdb("export", "STORE", "OUT", "--tar"),
    ],
    "decode": [convert("--check", "decode", "--on-bad", "skip"), LOADERS, LOADERS],
    "transcode": [convert("--transcode", "--check", "decode", "--on-bad", "skip"), LOADERS],
    "resize": [convert("--resize", "40", "--on-bad", "skip"), dali_lmdb("verify", "STORE", "--decode")],
    "train": [
        convert("--on-bad", "skip"),
        dali_lmdb(
            *("train", "--train", "STORE", "--val", "STORE", "--on-bad", "substitute", "--epochs", "1"),
            *("--arch", "squeezenet1_1", "--batch-size", "16", "--output", "OUT", *_TRAINING),
        ),
        dali_lmdb("compare", "STORE", "--arch", "none", "--rounds", "1", "--seconds", "0.1", *_TRAINING),
    ],
}
"""What is done to a folder of images, by name."""
CERTIFIES = {"decode", "transcode"}
"""Attacks whose store must have no bad record, and show the same pixels in every process."""


def environment(perturb):
    """Every error of the heap ends the process, and freed or new memory is filled with ``perturb``."""
    checked = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": str(perturb), "OMP_NUM_THREADS": "1"}
    if MALLOC_CHECKS is not None:
        checked["LD_PRELOAD"] = MALLOC_CHECKS
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **checked, "PYTHONPATH": path}


def failure(command, *, seconds, perturb):
    """Run a command; returns (what should not have happened or None, its standard output)."""
    process = subprocess.Popen(
        command,
        env=environment(perturb),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"runs for more than {seconds:.0f} s", ""
    lines = errors.splitlines() or [""]
    last = lines[-1]
    code = process.returncode
    if code < 0:
        return f"{signal.Signals(-code).name}: {last}", out
    if "Traceback (most recent call last)" in errors:
        return f"traceback: {last}", out
    if code > 1 or (code == 1 and not out and not any(line.startswith("Error: ") for line in lines)):
        return f"exit code {code}: {last}", out
    return None, out


class Run:
    """Attacks one group of images.

    Args:
        images: the group: name by path of each image's file.
        scratch: a folder for stores, removed again.
    """

    def __init__(self, images, *, scratch):
        self.images, self.scratch = images, scratch
        self.culprits, self.untested = [], 0

    def search(self, attack, names):
        """Attack images; if that fails, find out which of them it is."""
        if len(self.culprits) >= MOST_CULPRITS:
            self.untested += len(names)
            return
        what, bad = self._attack(attack, names)
        for name, cause in bad.items():
            self._note(attack, [name], cause)
        if what is None:
            return
        if len(names) == 1:
            self._note(attack, names, what)
            return
        found = len(self.culprits)
        self.search(attack, names[: len(names) // 2])
        self.search(attack, names[len(names) // 2 :])
        if len(self.culprits) == found:
            self._note(attack, names, f"only together: {what}")

    def _note(self, attack, names, what):
        self.culprits.append((names, what))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{attack}: {names[0]}{more}: {what}", flush=True)

    def _attack(self, attack, names):
        """(what failed or None, cause by name of each image that is in a store and should not be)."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            places = {"SOURCE": f"{folder}/images", "STORE": f"{folder}/x.lmdb", "OUT": f"{folder}/out"}
            for number, name in enumerate(names):
                path = Path(places["SOURCE"], str(number % 2), name)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(self.images[name], path)
            answers = []
            for number, command in enumerate(ATTACKS[attack]):
                if number and not Path(places["STORE"]).exists():
                    break  # not one image is good
                line = [places.get(word, word) for word in command]
                what, out = failure(line, seconds=90 + 0.3 * len(names), perturb=(85, 170)[number % 2])
                if what is not None:
                    words = " ".join(command[2:] if command[1] == "-m" else ["loaders"])
                    return f"{words}: {what}", {}
                if command is LOADERS:
                    answers.append(json.loads(out))
        return None, _uncertified(answers) if attack in CERTIFIES else {}


def _uncertified(answers):
    bad = {}
    for answer in answers:
        bad |= {Path(name).name: cause for name, cause in answer["bad"].items()}
        for name, pixels in answer["pixels"].items():
            if answers[0]["pixels"].get(name) != pixels:
                bad[Path(name).name] = "shows other pixels in another process"
    return bad


def write_group(files, folder, *, seed, numbers):
    """Write mutants; returns their paths by name."""
    folder.mkdir(parents=True)
    images = {}
    for number in numbers:
        data, source, done = mutant(files, seed=seed, number=number)
        stem = "".join(char if char.isalnum() else "_" for char in f"{Path(source).stem} {done}")[:100]
        path = folder / f"{number:07} {stem}.jpg"
        path.write_bytes(data)
        images[path.name] = path
    return images


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", type=int, default=1000, help="images in one folder")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--attack", choices=ATTACKS, action="append", help="default: all")
    parser.add_argument("--odd-images", type=Path, help="a folder of more files to begin with")
    options = parser.parse_args()
    files, begin, seconds, totals = corpus(options.odd_images), time.monotonic(), Counter(), Counter()
    culprits = options.folder / "culprits"
    culprits.mkdir(parents=True, exist_ok=True)

    def attack_group(first):
        numbers = range(first, min(first + options.group, options.first + options.cases))
        folder = options.folder / f"group-{first}"
        images = write_group(files, folder, seed=options.seed, numbers=numbers)
        for attack in options.attack or ATTACKS:
            started = time.monotonic()
            run = Run(images, scratch=options.folder)
            run.search(attack, list(images)[: FEW if attack == "train" else None])
            seconds[attack] += time.monotonic() - started
            totals["untested"] += run.untested
            totals["failures"] += len(run.culprits)
            for names, _ in run.culprits:
                if len(names) == 1:
                    shutil.copy(images[names[0]], culprits)
        shutil.rmtree(folder)
        print(
            f"{numbers.stop - options.first} of {options.cases}, {time.monotonic() - begin:.0f} s", file=sys.stderr
        )

    with ThreadPoolExecutor(options.jobs) as threads:
        list(threads.map(attack_group, range(options.first, options.first + options.cases, options.group)))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    by_attack = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(
        f"{options.cases} mutants of {len(files)} files: {totals['failures']} failures, "
        f"{totals['untested']} untested; {time.monotonic() - begin:.0f} s ({by_attack}), "
        f"{used.ru_utime + used.ru_stime:.0f} s of CPU time; largest process {used.ru_maxrss / 1024:.0f} MB"
    )
    sys.exit(1 if totals["failures"] else 0)


if __name__ == "__main__":
    main()
