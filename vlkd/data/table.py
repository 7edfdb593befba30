"""What the stream, the teachers and their caches ask of data: a table of images and captions, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image


@dataclass(frozen=True)
class Part:
    """Consecutive rows that are stored together.

    Attributes:
        name: short, of its file; "" where every picture is a file of its own.
        rows: how many.
        captions: how many they have.
        sha256: of the shard; "" where there is none.
    """

    name: str
    rows: int
    captions: int
    sha256: str = ""


class Table(Protocol):
    """Images and their captions. `Pairs` holds them in memory, `ShardTable` reads them from indexed shards.

    Attributes:
        problems: what was left out, in words.
        captioned: rows with a caption.
        caption_total: captions of all rows.
        most_captions: of any row.
    """

    @property
    def problems(self) -> Sequence[str]: ...
    @property
    def captioned(self) -> int: ...
    @property
    def caption_total(self) -> int: ...
    @property
    def most_captions(self) -> int: ...

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """The name of a row."""
        ...

    def captions_of(self, row: int) -> tuple[str, ...]:
        """The captions of a row; raises `BadImage` where they cannot be read."""
        ...

    def first_text(self, row: int) -> int:
        """The number of a row's first caption among those of all rows."""
        ...

    def image(self, row: int, size_hint: int | None = None) -> Image:
        """The decoded picture of a row; raises `BadImage` for one that cannot be used."""
        ...

    def parts(self) -> list[Part]:
        """The shards, in the order of the rows."""
        ...

    def row_state(self, row: int) -> str:
        """A hash of a row's key, captions and place, and of 256 bytes of its picture."""
        ...

    def fingerprint(self) -> str:
        """A hash of the whole table, without reading pictures."""
        ...

    def spread_rows(self, count: int) -> list[int]:
        """Up to `count` rows to look at, spread over the table as far as reading them is cheap."""
        ...

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch shards that are not on this machine, beside the reading, as fast as the iterator names them."""
        ...
