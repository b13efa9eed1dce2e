"""Settings, progress and summary of a conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from dali_lmdb.images.header import MAX_PIXELS
from dali_lmdb.images.reencoding import QUALITY

__all__ = ["Check", "ConvertProgress", "ConvertSettings", "OnBadImage", "Summary"]

Check = Literal["header", "decode", "none"]
OnBadImage = Literal["fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """How images are validated and re-encoded, and what happens to bad ones.

    Raises:
        ValueError: a setting is out of range.
    """

    check: Check = "header"
    """``"header"``: parse each file's header; ``"decode"``: decode it too, strictly and as the loaders will, and
    reject what libjpeg only warns about and what DALI does not decode; ``"none"``: store sizes and kinds as
    unknown (0)."""
    on_bad: OnBadImage = "fail"
    """``"fail"``: validate everything, report, publish nothing; ``"skip"``: publish without bad images."""
    max_pixels: int = MAX_PIXELS
    """Reject images with more pixels."""
    transcode: bool = False
    """Re-encode what the GPU cannot decode as baseline RGB JPEG; decode all images as ``check="decode"`` does."""
    resize: int | None = None
    """Shrink images whose shorter side exceeds this many pixels; None leaves all as they are."""
    quality: int = QUALITY
    """JPEG quality of what is re-encoded, 1 to 100."""

    def __post_init__(self) -> None:
        if self.check not in ("header", "decode", "none"):
            raise ValueError(f"check is {self.check!r}, expected 'header', 'decode' or 'none'")
        if self.check == "none" and (self.transcode or self.resize):
            raise ValueError("check 'none' does not inspect images, so transcode and resize need another check")
        if self.on_bad not in ("fail", "skip"):
            raise ValueError(f"on_bad is {self.on_bad!r}, expected 'fail' or 'skip'")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels}, expected at least 1")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize is {self.resize}, expected at least 1 pixel")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}, expected 1 to 100")

    @property
    def decodes_all(self) -> bool:
        """Whether every image is decoded."""
        return self.check == "decode" or self.transcode

    @property
    def decodes_any(self) -> bool:
        """Whether some images may be decoded."""
        return self.decodes_all or self.resize is not None

    def identity(self) -> dict[str, Any]:
        """The settings that must not differ when a conversion is resumed."""
        identity = asdict(self)
        del identity["on_bad"]  # only decides what happens at the end
        return identity


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a conversion."""

    store: str
    source: str
    """Kind of the source, as ``--source`` takes it."""
    records: int
    classes: int
    bytes: int
    """Total size of the images in the store."""
    seconds: float
    skipped: int
    """Bad images that are not in the store."""
    left_out: int
    """Files among the images or beside the class folders that were ignored (``Source.left_out``)."""
    reports: list[str]
    """Paths of the lists of bad images and ignored files; empty if there are none."""
    gpu: int
    """Records that nvJPEG decodes, where DALI decodes on the GPU (``decode_device="gpu"``)."""
    cpu: int
    """Records that fall back to a decoder on the CPU even then."""
    none: int
    """Records without a known decoder, or not validated."""
    transcoded: int
    resized: int

    @property
    def images_per_s(self) -> float:
        """Records a second."""
        return self.records / max(self.seconds, 1e-9)

    @property
    def megabytes_per_s(self) -> float:
        """10^6 bytes of the store's images a second."""
        return self.bytes / 1e6 / max(self.seconds, 1e-9)


class ConvertProgress(NamedTuple):
    """Progress of a conversion, given to the ``progress`` callback after every commit."""

    store: str
    """The file that is being written."""
    phase: Literal["writing", "verifying"]
    done: int
    """Number of this file's images that are done."""
    total: int
    num_bytes: int
    """Total size of the images written to this file in this run."""
