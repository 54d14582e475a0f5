"""Makes values from users and files fit for messages and logs: without passwords, without control characters, and not thousands of characters long."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

LONGEST = 400
"""Most characters of one value in a message."""
LONGEST_MESSAGE = 20_000
"""Most characters of a whole message."""
MASK = "***"
NO_PASSWORDS = (
    "a URL may not carry a user, a password or a signature: they would stand in configurations and logs; "
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role instead."
)
"""The reason in a message that refuses a URL with a password."""

# A colon and an at sign, as they are or escaped, however often.
_COLON, _AT = r"(?::|%(?:25)*3A)", r"(?:@|%(?:25)*40)"
# The user part of a URL, before an @: 's3://key:secret@bucket' (a secret may hold slashes, quotes or, up to the next @, spaces), 'https://token@host'; but not in
# 'http://host:9000/a@b'.
_NAME, _WORD, _WORDS = r"""[^\s/\\@:'"<>%]""", r"\S{0,2000}", r"[^\n@]{0,300}"
_PORT = r"""\d{1,5}(?:[/?#:;,.)\s]|['"](?:[\s,;:.)\]}]|$)|$)"""
_USER = re.compile(
    rf"(?i)\b(?P<web>https?:[/\\]{{1,9}})(?!\[[0-9a-f:.]*\](?::\d{{1,5}})?(?:/|$))"
    rf"(?:{_NAME}{{0,300}}{_COLON}(?!{_PORT})(?:{_WORD}|{_WORDS}){_AT}|{_NAME}{{1,2000}}{_AT})"
    rf"|(?P<other>(?<![a-z0-9+.\-])(?!https?:|file:)[a-z][a-z0-9+.\-]{{0,30}}:[/\\]{{1,9}}){_NAME}{{0,300}}{_COLON}(?:{_WORD}|{_WORDS}){_AT}"
    rf"|(?<=://)(?<!http://)(?<!https://){_NAME}{{1,2000}}{_AT}"
)
# The same without a scheme, 'key:secret@bucket', as a word of its own; but not 'host:9000/a@b', 'image:tag@sha256:...' or 'file:///a@b'.
_BARE = re.compile(rf"""(?i)(?<![^\s'"=(\[,]){_NAME}{{1,300}}{_COLON}(?!{_PORT})(?![/\\])\S{{1,300}}{_AT}(?!sha256:)(?=[\w\[])""")
# A whole value that is a URL with a user, whatever characters a password has.
_WHOLE = re.compile(r"(?is)\s*(?:https?:[/\\]+(?!\[)[^/\\@:]*:(?!\d{1,5}(?:[/?#]|$))|(?!https?:|file:)[a-z][a-z0-9+.-]*:[/\\]+[^/\\@:]*:).*@")
# Query parameters that sign a request in a URL.
_SIGNATURE = re.compile(
    r"""(?i)(?<=[?&;#])((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|AccountKey|sig|(?:access_)?token|api_?key|password|secret)"""
    r"""(?:=|%(?:25)*3D))[^&\s'"<>]+"""
)
_SECRET_NAMES = re.compile(
    r"(?:^|_)(?:SECRET|TOKEN|PASSWD|PASSPHRASE|KEY|CREDENTIAL|CREDENTIALS|CONNECTION_STRING|PWD|PASS)(?:_ID)?$|PASSWORD(?:_ID)?$"
)
_NO_SECRETS = ("GOOGLE_APPLICATION_CREDENTIALS", "PWD")  # paths, without which messages would name nothing
_INSIDE = re.compile(r"(?i)(?:AccountKey|SharedAccessSignature)=([^;\s]+)")
"""Secrets in Azure's connection strings, which libraries take apart."""
_SHORTEST_SECRET = 8  # shorter values may be common words, which would be masked everywhere
# Characters that move a terminal's cursor, change the direction of text, or cannot be written as UTF-8. Our own messages use line ends and tabs.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MOST_ESCAPES = 3
_RUN = re.compile(rf"\S{{{LONGEST + 1},}}")


def message(text: str) -> str:
    """A message made fit to be printed and stored; unchanged if it is already."""
    masked = escaped(mask(text))
    whole = _RUN.sub(lambda found: cut(found.group()), masked)
    return whole if len(whole) <= LONGEST_MESSAGE else f"{whole[: LONGEST_MESSAGE - 40]}… ({len(whole):,} characters)"


def escaped(text: str) -> str:
    """Text whose control characters are escaped: a log or a reason in somebody else's run folder would move the cursor, rename the terminal, or write to its
    clipboard. Ends of lines and tabs stay."""
    return _UNSEEN.sub(lambda found: ascii(found.group())[1:-1], text)


def mask(text: str) -> str:
    """Text in which passwords and signatures in URLs, and secrets from this process's environment, are masked."""
    if "@" in text or "%" in text:
        text = _BARE.sub(f"{MASK}@", _USER.sub(lambda found: f"{found['web'] or found['other'] or ''}{MASK}@", text))
    text = _SIGNATURE.sub(rf"\1{MASK}", text)
    for secret in secrets():
        if secret in text:
            text = text.replace(secret, MASK)
    return text


def secrets() -> Iterator[str]:
    """Values of environment variables whose names say that they are secret, such as AWS_SECRET_ACCESS_KEY (but not AWS_WEB_IDENTITY_TOKEN_FILE)."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and name not in _NO_SECRETS and _SECRET_NAMES.search(name.upper()):
            yield value
            yield from (inside for inside in _INSIDE.findall(value) if len(inside) >= _SHORTEST_SECRET)


def holds_password(text: str) -> bool:
    """Whether a URL contains a user, a password or the signature of a request; in a name without a scheme, see ``place_holds_password``."""
    return any(_in_url(form) for form in _forms(text))


def place_holds_password(text: str) -> bool:
    """The same for a value that names a place: 'key:secret@bucket' holds a password without any scheme, too."""
    return any(_in_url(form) or (bool(_BARE.match(form)) and not re.search(r"\s", form)) for form in _forms(text))


def _in_url(text: str) -> bool:
    authority = re.split(r"[/?#\s]", text.partition("://")[2], maxsplit=1)[0]
    return "@" in authority or bool(_WHOLE.match(text) or _USER.search(text) or _SIGNATURE.search(text))


def _forms(text: str) -> Iterator[str]:
    """A value as it is, and without its escapes: ``%40`` is an @, and ``%2540`` is one after two steps."""
    yield text
    for _ in range(_MOST_ESCAPES):
        plain = unquote(text)
        if plain == text:
            return
        text = plain
        yield text


def value(given: Any, most: int = LONGEST) -> str:
    """The repr of a value, shortened in the middle."""
    if isinstance(given, str) and len(given) > 4 * most:  # do not compute the repr of a megabyte
        given = given[:most] + given[-most:]
    return cut(mask(repr(given)), most)


def cut(text: str, most: int = LONGEST) -> str:
    """Text of at most ``most`` characters; longer text is replaced by its beginning, its length and its end."""
    if len(text) <= most:
        return text
    note = f"…({len(text):,} characters)…"
    end = most // 4
    return text[: most - end - len(note)] + note + text[-end:]


def markdown(text: str, most: int = LONGEST) -> str:
    """Text from data as a piece of a line of Markdown, in a table or not: without line ends and markup. Usual names and values stay as they are."""
    return printable(mask(text), most).replace("`", "'").replace("|", "\\|").replace("<", "&lt;").replace("](", "] (")


def printable(text: str, most: int) -> str:
    """Text as at most ``most`` printable characters; characters that are not printable are escaped."""
    # Cut before escaping: the escapes of a megabyte would take several.
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: 4 * most])
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 1] + "…"
