"""What the pages for maintainers say of the repository is still so."""

import re
from pathlib import Path

import pytest
from test_packaging import MAY_IMPORT, PACKAGE, ROOT, modules

from dali_lmdb.store.layout import FORMAT_VERSION, INDEX_SCHEMA

DESIGN = PACKAGE / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"

SUFFIXES = (".cfg", ".md", ".py", ".sh", ".toml")
PATH = re.compile(r"\.?\w[\w.-]*(/[\w.-]+)*/?")
PLACEHOLDERS = {"NAME.py"}


def code_spans(text):
    """What stands in backticks, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def is_path(span, folders):
    """Whether a code span is meant as a path: by its end, or because it begins with a folder that exists."""
    if not PATH.fullmatch(span) or span in PLACEHOLDERS:
        return False
    first, slash, _ = span.partition("/")
    return span.endswith((*SUFFIXES, "/")) or (
        slash != "" and any((folder / first).is_dir() for folder in folders)
    )


def missing_paths(text, folders):
    paths = [span for span in code_spans(text) if is_path(span, folders)]
    assert paths, "no path was found: does this test still look at the right thing?"
    return [path for path in paths if not any((folder / path).exists() for folder in folders)]


def section(title):
    """The text of a section of the design, up to the next one of its level."""
    text = DESIGN.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found


def rows(text):
    """Cells of the rows of all tables in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize(
    ("page", "folders"),
    [(DESIGN, [ROOT, PACKAGE]), (CONTRIBUTING, [ROOT, PACKAGE, PACKAGE / "convert" / "sources"])],
    ids=["design", "contributing"],
)
def test_every_path_that_is_named_exists(page, folders):
    assert missing_paths(page.read_text(encoding="utf-8"), folders) == []


def test_a_path_that_does_not_exist_is_found():
    text = "`store/gone.py`, `dali_lmdb/gone/`, `tests/gone`, `store/layout.py`, `a / b`, `STORE.partial`, `mdb.c`"
    assert missing_paths(text, [ROOT, PACKAGE]) == ["store/gone.py", "dali_lmdb/gone/", "tests/gone"]


@pytest.mark.parametrize("path", modules())
def test_the_layers_and_the_data_flow_name_every_modules_folder(path):
    named = code_spans(section("Layers") + section("Data flow"))
    folder = Path(path).parent.as_posix()
    assert (path if folder == "." else f"{folder}/") in named


def test_the_layers_are_those_that_are_enforced():
    names = {f"`{name}.py`" if (PACKAGE / f"{name}.py").exists() else f"`{name}/`": name for name in MAY_IMPORT}
    layers = {names[cells[0]]: cells[2] for cells in rows(section("Layers")) if cells[0] in names}
    assert {name: set(filter(None, allowed.split(", "))) for name, allowed in layers.items()} == MAY_IMPORT


def test_the_formats_versions_and_columns_are_all_described():
    cells = rows(section("The store's format"))
    assert [int(row[0]) for row in cells if row[0].isdigit()] == list(range(1, FORMAT_VERSION + 1))
    described = {name for row in cells for name in code_spans(row[0])}
    assert set(INDEX_SCHEMA.names) <= described
