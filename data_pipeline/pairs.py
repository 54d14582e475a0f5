"""The unit that sources yield: one image, its captions, and where both come from."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Pair:
    """One captioned image before filters and splits."""

    id: str
    """Unique among all sources, and stable: the same drawing has the same id in every run."""
    captions: tuple[str, ...]
    """At least one, the fullest first."""
    image: bytes
    """An encoded image file, as found or rendered."""
    source: str
    """Name of the source, for example 'twemoji' or the URL of a folder."""
    license: str
    """SPDX identifier, or 'unknown'."""
    group: str
    """Key of the split: pairs of one group never lie in different splits."""


class Source(Protocol):
    """A list of handles that is cheap to make, and a way to read one pair."""

    def keys(self) -> list[str]:
        """Handles in a stable order; nothing is decoded or rendered.

        Raises:
            DataError: the source is missing or empty.
        """
        ...

    def read(self, key: str) -> Pair:
        """Read or render the pair of one handle.

        Raises:
            DataError: the handle's files cannot be read.
        """
        ...

    def group(self, key: str) -> str:
        """Split key of one handle, without reading its image."""
        ...

    def version(self) -> str:
        """What the pairs depend on besides their handles (package versions, render size): a part is done again when it changes."""
        ...

    def credits(self) -> dict[str, str]:
        """Source name of a record -> one line naming author, licence and origin."""
        ...
