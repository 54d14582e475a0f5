"""Reads captions from the command line or a file, and makes notes about those that the tokenizer cannot represent well."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_pipeline.letters import has_surrogate
from data_pipeline.tokenizer import Tokenizer
from infra import storage, text
from infra.errors import DataError
from train.drawing.samples import MOST_LETTERS

_SHOWN = 8
"""A note quotes at most this many characters."""


def read_captions(given: Sequence[str], file: str) -> list[str]:
    """The captions of the command line and of a file ('-': standard input) with one in each line. Repeated captions and blank lines are left out.

    Raises:
        DataError: the file is missing, or is not UTF-8; or a caption is not (on a command line), or is too long to be recorded.
    """
    found = list(given)
    if file:
        try:
            content = sys.stdin.buffer.read().decode() if file == "-" else storage.read_text(file)
        except UnicodeDecodeError as error:
            raise DataError(f"--file -: not UTF-8 text ({error}).") from error
        found += [line for line in text.lines(content) if line.strip()]
    for caption in found:
        if has_surrogate(caption):
            raise DataError(
                f"the caption '{shortened(caption)}' is not UTF-8 text; give it as such (a terminal's encoding is that of LC_ALL or LANG)."
            )
        if len(caption) > MOST_LETTERS:
            raise DataError(f"the caption '{shortened(caption)}' has {len(caption):,} characters; accepted are up to {MOST_LETTERS:,}.")
    return list(dict.fromkeys(found))


def notes(tokenizer: Tokenizer, caption: str) -> list[str]:
    """Notes about a caption that explain why its pictures may be unexpected."""
    quoted = f"'{shortened(caption)}'"
    if not caption.strip():
        return [f"the caption {quoted} is empty: its pictures are of anything."]
    found = []
    odd = [character for character in tokenizer.spelled_in_bytes(caption) if character.isprintable()]
    if odd:
        shown = "".join(odd[:_SHOWN]) + ("…" if len(odd) > _SHOWN else "")
        found.append(f"{quoted}: rare or unknown in training, and spelled in bytes: {shown}")
    if not all(character.isprintable() for character in caption):
        found.append(f"{quoted}: holds control characters; no training caption is likely to.")
    length = tokenizer.count(caption)
    if length > tokenizer.max_tokens:
        found.append(f"{quoted}: {length} tokens, of which the first {tokenizer.max_tokens} are read (tokenizer.max_tokens).")
    return found


def shortened(caption: str, letters: int = 60) -> str:
    """A caption as one printable line: control characters are escaped, and a long caption is cut."""
    line = "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in caption[: letters + 1])
    return line if len(line) <= letters else line[: letters - 1] + "…"
