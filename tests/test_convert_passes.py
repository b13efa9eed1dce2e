"""How often a conversion goes through its source and its journal."""

import pytest
from conversions import refusal

from dali_lmdb.convert import convert
from dali_lmdb.convert._journal import ROW_SCHEMA, Journal, Row
from dali_lmdb.convert.sources import FolderSource


def test_the_journal_is_read_once_by_an_uninterrupted_conversion(small_pieces, monkeypatch, image_folder, target):
    original, read = Journal.rows, []

    def rows(self):
        for batch in original(self):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(Journal, "rows", rows)
    convert(image_folder, target, commit_records=5)
    assert read == [5, 5, 5, 5, 4]  # to make the index


def test_a_row_of_the_journal_has_the_fields_of_its_schema():
    assert list(Row._fields) == ROW_SCHEMA.names


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize(("difference", "what"), [(-1, "removed"), (1, "added")])
def test_a_source_with_other_items_than_it_counted_makes_no_store(image_folder, target, shards, difference, what):
    class Miscounted(FolderSource):
        def count(self):
            return super().count() - difference

    assert f"changed during the conversion: images were {what}" in refusal(
        Miscounted(image_folder), target, shards=shards
    )
