"""The member names of a tar that show what kind of source it is."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from dali_lmdb.convert.sources._archive import Archive, Member
from dali_lmdb.convert.sources.tar import is_tar_name
from dali_lmdb.convert.sources.webdataset import LABEL_EXTENSION, key_and_extension
from dali_lmdb.images.names import IMAGE_EXTENSIONS, is_image_name

__all__ = ["TarContents"]


class TarContents:
    """The names of a tar's members up to the first label, which settles the kind; only headers are read.

    Args:
        archive: the tar, or the archive that holds it.
        inner: the tar inside the archive; by default the archive itself.

    Attributes:
        label: a WebDataset label (``KEY.cls``).
        siblings: an image and the non-image next to it, if they are one record by WebDataset's rule.
        other: a file that is not an image, a label, a tar or hidden.
        tars: the tars in it.
        folders: number of images directly in each folder; ``""`` for the top.

    Raises:
        SourceError: the archive is damaged, or has members that are refused (see ``_archive.py``).
    """

    def __init__(self, archive: Archive, inner: Member | None = None) -> None:
        self.label: str | None = None
        self.siblings: tuple[str, str] | None = None
        self.other: str | None = None
        self.tars: list[Member] = []
        self.folders: Counter[str] = Counter()
        self._before = _Name("", "", "")
        for member in archive.members(self._note, inner=inner):
            if member.is_folder:
                self.folders[member.path] += 0  # listed even if it has no images
            elif is_tar_name(member.path):
                self.tars.append(member)
            elif is_image_name(member.path):
                self.folders[member.path.rpartition("/")[0]] += 1
            else:
                self.label = member.path
                break

    @property
    def num_images(self) -> int:
        return sum(self.folders.values())

    @property
    def subfolders(self) -> list[str]:
        """Folders at the top, sorted."""
        return sorted({path.partition("/")[0] for path in self.folders} - {""})

    def _note(self, path: str) -> bool:
        """Record what a path shows; return whether to list it. Called with every path in the archive's order."""
        before, name = self._before, _Name(path, *key_and_extension(path))
        self._before = name
        if self.siblings is None and name.key == before.key:
            for image, other in ((name, before), (before, name)):
                if image.extension in IMAGE_EXTENSIONS and not is_image_name(other.path):
                    self.siblings = image.path, other.path
        listed = is_image_name(path) or is_tar_name(path) or name.extension == LABEL_EXTENSION
        if not listed and self.other is None and not path.rpartition("/")[2].startswith("."):
            self.other = path
        return listed


class _Name(NamedTuple):
    """A path as WebDataset splits it."""

    path: str
    key: str
    extension: str
