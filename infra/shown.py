"""What messages and logs show of what others have chosen: no password, no control character, and not thousands of characters of one value."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

LONGEST = 400
"""Characters of one value in a message."""
LONGEST_MESSAGE = 20_000
"""Characters of a whole message."""
MASK = "***"
NO_PASSWORDS = (
    "a URL may not carry a user, a password or a signature: they would stand in configurations and logs; "
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role instead."
)
"""What is said where a URL is refused for its password."""

# In a URL, whoever stands before an @: 's3://key:secret@bucket' (secrets hold slashes), 'https://token@host'. 'http://host:9000/a@b' is none.
_USER = re.compile(r"""(?<=://)(?:[^\s/@:'"<>]{0,300}:(?!\d{1,5}/)[^\s'"<>]{0,2000}|[^\s/@:'"<>]{1,2000})@""")
# What signs a request in a URL.
_SIGNATURE = re.compile(
    r"""(?i)(?<=[?&])((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|sig|token|password|secret)=)[^&\s'"<>]+"""
)
_SECRET_NAMES = re.compile(r"(?:^|_)(?:SECRET|TOKEN|PASSWORD|PASSWD|KEY|CREDENTIAL|CREDENTIALS)(?:_ID)?$")
_SHORTEST_SECRET = 8  # shorter values are words that stand in many places
# What moves a terminal's cursor, turns text round, or cannot be written as UTF-8. Line ends and tabs are ours.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_RUN = re.compile(rf"\S{{{LONGEST + 1},}}")


def message(text: str) -> str:
    """A message as it may be printed and stored; what is fine comes back as it is."""
    masked = _UNSEEN.sub(lambda found: ascii(found.group())[1:-1], mask(text))
    whole = _RUN.sub(lambda found: cut(found.group()), masked)
    return whole if len(whole) <= LONGEST_MESSAGE else f"{whole[: LONGEST_MESSAGE - 40]}… ({len(whole):,} characters)"


def mask(text: str) -> str:
    """Text without the passwords of URLs, signatures of requests, and what this process's environment holds as a secret."""
    if "://" in text:
        text = _SIGNATURE.sub(rf"\1{MASK}", _USER.sub(f"{MASK}@", text))
    for secret in secrets():
        if secret in text:
            text = text.replace(secret, MASK)
    return text


def secrets() -> Iterator[str]:
    """Values of the environment whose names say that they are secret, such as AWS_SECRET_ACCESS_KEY; names of files are none."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAMES.search(name.upper()):
            yield value


def holds_password(text: str) -> bool:
    """Whether a URL carries a user, a password or the signature of a request."""
    return "://" in text and bool(_USER.search(text) or _SIGNATURE.search(text))


def value(given: Any, most: int = LONGEST) -> str:
    """A value as Python writes it, cut in the middle."""
    if isinstance(given, str) and len(given) > 4 * most:  # a megabyte is not first written out
        given = given[:most] + given[-most:]
    return cut(mask(repr(given)), most)


def cut(text: str, most: int = LONGEST) -> str:
    """At most ``most`` characters: of longer text the beginning, its length, and the end."""
    if len(text) <= most:
        return text
    note = f"…({len(text):,} characters)…"
    end = most // 4
    return text[: most - end - len(note)] + note + text[-end:]


def printable(text: str, most: int) -> str:
    """Any text as at most ``most`` printable characters; others are escaped."""
    # Cut first: escapes of a megabyte are many megabytes.
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: 4 * most])
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 1] + "…"
