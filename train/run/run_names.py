"""Names for several runs that are shown together."""

from __future__ import annotations

from collections.abc import Sequence

from infra import storage


def distinct(urls: Sequence[str]) -> dict[str, str]:
    """A name for each run -> its URL: the name of its folder, with as many of the folders above as make it the only one. The same folder counts once."""
    parts = {url: storage.absolute(url).rstrip("/").removeprefix("file://").split("/") for url in urls}
    named: dict[str, str] = {}
    for words, url in {tuple(words): url for url, words in parts.items()}.items():
        depth = 1
        while depth < len(words) and any(tuple(other) != words and tuple(other[-depth:]) == words[-depth:] for other in parts.values()):
            depth += 1
        named["_".join(word.strip(":") for word in words[-depth:] if word.strip(":"))] = url
    return named
