"""Captions that are mostly boilerplate: dates, file names, camera defaults and stock phrases (paper, appendix C; Sharma et al. 2018)."""

from __future__ import annotations

import re

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_YEAR = r"(?:1[89]|20)\d\d"

_DATES = (
    rf"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?{_DAY}[\s\-/.]{{1,3}}(?:of\s+)?{_MONTH}(?:[\s\-/,.']{{1,3}}(?:{_YEAR}|\d\d))?\b",  # 12th of May 2013, 12-May-13
    rf"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?{_MONTH}\s+{_DAY}\b(?:,?\s+{_YEAR}\b)?",  # May 12, 2013
    rf"{_MONTH}[\s,\-']{{1,3}}{_YEAR}\b",  # May 2013
    r"\b\d{4}[:.\-/]\d{1,2}[:.\-/]\d{1,2}(?:T\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?Z?)?\b",  # 2013-05-12, EXIF's 2013:05:12, ISO 8601
    r"\b\d{1,2}[.\-/]\d{1,2}[.\-/](?:\d{4}|\d\d)\b",  # 12.05.2013, 5/12/13
    r"\b\d{1,2}:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:\s?[ap]\.?m\b\.?|Z\b)?",  # 10:33:21 am
    r"\b\d{1,2}\s?[ap]m\b",
)
_FILES = (
    r"(?<![^\s/\\])[^\s/\\]{1,200}\.(?:jpe?g|png|gif|bmp|tiff?|webp|svg|heic|cr2|nef|arw|dng|psd|eps|raw|mp4|mov|pdf|html?|php|aspx?)\b",
    r"\b(?:IMG|DSC[NF]?|PICT|CIMG|SANY|SAM|HPIM|GOPR|PXL|VID|PANO|MVC|DCP|MVIMG|BURST|WP|IMAG|PIC|SCAN|FB_IMG|IMGP|GEDC|SDC|STA|STB|DJI|KIF)[_\-\s]?\d[\w\-]*",
    r"\bP\d{7}\b",
    r"\b_?(?:MG|DSC|IGP)_?\d{3,}\b",
    r"\b(?:image|photo|picture|pic|img|foto|scan|slide|page|figure|fig|plate|screenshot|file|untitled|attachment)\s?[#_\-.(]?\s?\d+\)?(?:\s?(?:of|/)\s?\d+)?\b",
    r"\b(?=[0-9a-f\-]*\d)[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}\b",
    r"\b(?=[0-9a-f]*\d)[0-9a-f]{16,64}\b",
    r"(?<!\w)(?=\w*\d)\w{1,40}_\w{1,200}",  # holiday_0123_b
    r"\b(?:https?://|www\.)\S{1,2000}",
    r"\bscreen\s?shot(?:s|\s+(?:at|from))?\b",
    r"\b\d{3,5}\s?[x×]\s?\d{3,5}(?:\s?(?:px|pixels))?\b",
)
_CAMERAS = (
    r"\b(?:olympus|sony|minolta|konica(?: minolta)?|samsung|kodak|nikon|fujifilm|casio|pentax|canon|panasonic|hp|vivitar)"
    r"\s+(?:digital(?: still)? camera|dsc|camera pictures|corporation|optical co\.,?\s?ltd\.?)\b",
    r"\bdigital (?:still )?camera\b",
    r"\bexif[_ ]jpeg(?:[_ ](?:picture|t422))?\b",
    r"\bprocessed with \w+(?: with \w+ preset)?\b",
    r"\bcreated (?:with|by|using|in) (?:the )?(?:gimp|adobe \w+|photoshop|canva|paint(?:\.net)?|nokia \w+|dji camera)\b",
    r"\blead technologies inc\.? v[\d.]+",
    r"\bcreator: gd-jpeg v[\d.]+(?: \(using ijg jpeg v\d+\), (?:default )?quality(?: = \d+)?)?",
    r"\bapplemark\b",
    r"\b(?:shot|taken|captured) (?:with|on) (?:a |an |my )?(?:iphone|canon|nikon|sony|samsung|olympus|leica|fujifilm|kodak)\b",
)
_PHRASES = (
    r"\bimage (?:may contain|result for|could contain)\b:?",
    r"\b(?:photograph(?:ed|s)?|photos?|pictures?|images?|shots?|snapped|captured|taken|uploaded|posted|published|filed|scanned|modified|created|added)"
    r"(?:\s+(?:was|were|taken|shot|made|photographed)){0,3}"
    r"(?:\s+(?:on|by|in|at|from)\s*$|(?:\s+(?:on|by|in|at|from))?\b(?=\s*(?:\d|{month})|\s+(?:mon|tues|wednes|thurs|fri|satur|sun)day))",
    r"\b(?:photo|image|picture|illustration|graphic)s?\s*(?:by|via|credits?|courtesy(?: of)?|copyright|source)\b:?",
    r"\bphotograph(?:ed|y|er)?(?:\s+by)?:",
    r"\b(?:royalty[\s-]free|rights[\s-]managed|copyright(?:ed)?|all rights reserved|watermark(?:ed)?|stock)"
    r"(?:\s+(?:photograph(?:y|s)?|photos?|images?|pictures?|vectors?|illustrations?|footage|clip\s?art|pics?|art|graphics))*\b",
    r"©|\(c\)\s?\d{4}",
    r"\b(?:getty images|shutter\s?stock|i\s?stock(?:photo)?|alamy|dreamstime|deposit\s?photos|adobe stock|123rf|fotolia|bigstock|flickr|pinterest|instagram|unsplash)\b",
    r"\b(?:click|tap|press|hover)(?:\s+(?:here|on|the|this|image|photo|picture|thumbnail|for|to|a))*"
    r"\s+(?:enlarge|zoom|expand|view|see|download|open|full|larger?|bigger)(?:\s+(?:it|the|a|full|larger?|bigger|size|sized|image|photo|picture|version|view))*\b",
    r"\b(?:view|see|show)\s+(?:the\s+)?(?:full|larger?|bigger|original)(?:[\s-](?:size|image|photo|picture|version|resolution))*\b",
    r"\b(?:free\s+)?(?:hd\s+|4k\s+)?(?:download|wallpapers?|screensavers?)(?:\s+(?:now|free|hd|4k|image|photo|wallpaper|for|desktop))*\b",
    r"\b(?:embed|share|save|pin|print|email) (?:this|it)(?: (?:image|photo|picture|on|to|page|post))*\b",
    r"\b(?:image|photo|picture|pic)s?(?:\s+is)?(?:\s+(?:not|un|currently))*\s*(?:available|found|unavailable|missing)\b",
    r"\bno (?:image|photo|picture|caption|title|description|alt text)(?: (?:available|provided|found|yet))?\b",
    r"\b(?:un(?:titled|named|known)|placeholder|thumbnails?|profile (?:photo|picture|image)|featured image|user avatar|avatar|header image|cover (?:photo|image)|default|"
    r"blank|loading|read more|more info|sponsored|advertisement|share button|next|previous|back to top)\b",
    r"\bcopy of\b",
)

_ALL = re.compile("|".join((*_DATES, *_FILES, *_CAMERAS, *_PHRASES)).replace("{month}", _MONTH), re.IGNORECASE)
_SIGNS = re.compile(r"[\d_©]|\.\w|://")
_HINT_WORDS = """
    photo photos photograph photographs photographed photographer photography picture pictures image images shot shots snapped captured taken uploaded
    posted published filed scanned modified created added stock copyright copyrighted watermark watermarked rights royalty getty shutterstock shutter
    istock istockphoto i alamy dreamstime depositphotos deposit adobe fotolia bigstock flickr pinterest instagram unsplash click tap press hover view see
    show free hd download wallpaper wallpapers screensaver screensavers embed share save pin print email pic pics no untitled unnamed unknown placeholder
    thumbnail thumbnails profile featured user avatar header cover default blank loading read more sponsored advertisement next previous back copy screenshot
    screen illustration illustrations graphic graphics olympus sony minolta konica samsung kodak nikon fujifilm casio pentax canon panasonic hp vivitar
    digital exif processed lead creator applemark monday tuesday wednesday thursday friday saturday sunday
"""
_HINTS = frozenset(_HINT_WORDS.split())
"""A caption with none of these words and without ``_SIGNS`` (digits and the like) holds no boilerplate. This test is fast, and enough for most captions."""
_NUMBER = re.compile(r"(?<!\w)[#№]?\d[\d.,:/\-]*(?!\w)")
_WORD = re.compile(r"[^\W\d_]+")
_FILLER_WORDS = (
    "a an the of on in at by to from for with and or is was it its this that my our your no s st nd rd th am pm est pst gmt utc jpg jpeg png"
)
_FILLER = frozenset(_FILLER_WORDS.split())
_MAX_CHARACTERS = 2000  # enough to decide, and it bounds the time for any caption


def is_boilerplate(caption: str) -> bool:
    """Whether boilerplate makes up at least half of the letters of a caption (of its first 2,000 characters), and fewer than two meaningful words remain.

    Bare numbers do not count: 'Boeing 747' is no boilerplate, but '12345' is.
    """
    text = caption[:_MAX_CHARACTERS]
    if not _SIGNS.search(text) and _HINTS.isdisjoint(_WORD.findall(text.lower())):
        return False
    rest = _NUMBER.sub(" ", _ALL.sub(" ", text))
    before, after = (sum(map(str.isalnum, part)) for part in (_NUMBER.sub(" ", text), rest))
    if 2 * (before - after) < before or (before == 0 and not any(map(str.isdigit, text))):
        return False
    return len({word.lower() for word in _WORD.findall(rest)} - _FILLER) < 2
