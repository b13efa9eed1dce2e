"""Every parser of foreign bytes gives a result or one of our errors, in bounded memory and time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_parsers import PARSERS

TESTS = Path(__file__).parent
CASES = int(os.environ.get("DALI_LMDB_FUZZ_CASES", "2000"))


@pytest.mark.parametrize("parser", PARSERS)
def test_damage_gives_a_result_or_one_of_our_errors(parser, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "fuzz_parsers.py", parser, tmp_path, str(CASES)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]  # its last line names the case
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert sum(result["outcomes"].values()) == CASES
    assert result["outcomes"]["read"] > CASES // 50  # the damage is such that some is read
