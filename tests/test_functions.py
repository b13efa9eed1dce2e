"""The commands as functions, as README shows them."""

import os
import re

import pytest
from test_packaging import ROOT

from dali_lmdb.convert import convert
from dali_lmdb.inspect import export, verify


def test_the_functions_do_what_readme_shows(images, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (shown,) = [block for block in blocks if "verify(" in block]
    monkeypatch.chdir(tmp_path)
    exec(shown, {})
    assert capsys.readouterr().out == "24 3 []\n"
    assert sorted(os.listdir("copy/ant")) == sorted(os.listdir("images/ant"))


def test_a_number_of_threads_that_no_process_can_have_is_refused(images, store_path, tmp_path):
    for call in (
        lambda: convert(images, tmp_path / "x.lmdb", num_threads=0),
        lambda: export(store_path, tmp_path / "out", num_threads=0),
        lambda: verify(store_path, num_threads=0),
        lambda: verify(store_path, num_threads=-1, decode=True),
        lambda: verify(store_path, num_threads=1025),
    ):
        with pytest.raises(ValueError, match=r"num_threads is (0|-1|1025), expected 1 to 1024"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
