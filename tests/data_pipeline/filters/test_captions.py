"""Captions: what is boilerplate, what is English, and the reasons to drop one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import FilterConfig
from data_pipeline.filters.boilerplate import is_boilerplate
from data_pipeline.filters.captions import caption_reason
from data_pipeline.filters.language import is_english
from infra.errors import ConfigError

CAPTION = "a brown dog runs across the field"
OFF = FilterConfig(min_words=0, max_characters=0, broken_text=False, english=False, boilerplate=False, max_repetition=1.0)


@pytest.mark.parametrize(
    ("caption", "expected", "switched_off"),
    [
        ("a dog", "caption too short", {"min_words": 2}),
        ("a dog - !", "caption too short", {"min_words": 0}),
        ("a dog runs home " * 80, "caption too long", {"max_characters": 1280, "max_repetition": 1.0}),
        ("a dog runs\x00 across the field", "broken text", {"broken_text": False}),
        ("salt &amp; pepper on a table", "broken text", {"broken_text": False}),
        ("a <b>big</b> dog runs home", "broken text", {"broken_text": False}),
        ("the caf\ufffd in the old town", "broken text", {"broken_text": False}),
        ("Ein Hund läuft über eine grüne Wiese", "not English", {"english": False}),
        ("一只狗在绿色的草地上奔跑 和 孩子", "not English", {"english": False, "min_words": 2}),
        ("photographed on 12 May 2013", "boilerplate", {"boilerplate": False}),
        ("dog dog dog dog dog dog dog runs", "repetitive caption", {"max_repetition": 1.0}),
    ],
)
def test_a_caption_is_dropped_for_its_reason_and_kept_when_the_filter_is_off(caption: str, expected: str, switched_off: dict) -> None:
    assert caption_reason(caption, FilterConfig()) == expected
    assert caption_reason(caption, FilterConfig(**switched_off)) is None


def test_filters_of_captions_that_are_off_by_default() -> None:
    title = "The Old Bridge Of Mostar At Night"
    assert caption_reason(title, FilterConfig()) is None
    assert caption_reason(title, FilterConfig(max_capitals=0.9)) == "capitalised caption"
    assert caption_reason(CAPTION, FilterConfig(max_capitals=0.9)) is None
    assert caption_reason("New York City", FilterConfig(max_capitals=0.9)) is None, "a short caption may be a name"


def test_ordinary_captions_pass() -> None:
    for caption in (
        CAPTION,
        "A man in a red shirt and a woman in a blue shirt walk a dog on the beach",
        "Two children play soccer; one of them isn't wearing shoes.",
        "AT&T building in New York <3",
        "the flag of Côte d’Ivoire \U0001f1e8\U0001f1ee",
        "sushi platter with salmon and tuna nigiri",
    ):
        assert caption_reason(caption, FilterConfig()) is None, caption


@pytest.mark.parametrize("caption", ["", " \t\n", "\u200b\u200d\ufeff", "\x00\x01"])
def test_nothing_visible_is_no_caption_whatever_is_switched_off(caption: str) -> None:
    assert caption_reason(caption, OFF) == "empty caption"


BOILERPLATE = """photographed on 12 May 2013|Photographed on May 12, 2013|photographed on 12/05/2013|Photo taken on 2013-05-12|Photo taken 3 June 2010
taken on 12.05.2013 at 10:33|2013:05:12 10:33:21|2013-05-12T10:33:21Z|12th of May 2013|Sunday, 12 May 2013|May 2013|12-May-13|Sept. 3, 2009|5/12/13 10:33 AM
20130512_103321|IMG_1234|IMG_1234.JPG|IMG-20180101-WA0001|DSC00012|DSC_0001|DSCN1234|DSCF0042.jpg|P1010123|_MG_1234|PICT0001|100_1234|PXL_20210101_101010101
OLYMPUS DIGITAL CAMERA|SONY DSC|KONICA MINOLTA DIGITAL CAMERA|SAMSUNG CAMERA PICTURES|Kodak Digital Still Camera|Exif_JPEG_PICTURE|Created with GIMP
Processed with VSCO with f2 preset|LEAD Technologies Inc. V1.01|CREATOR: gd-jpeg v1.0 (using IJG JPEG v62), quality = 90|untitled|Untitled-1|image001|image 12
photo (3)|Photo 3 of 12|slide 5|Screen Shot 2014-02-03 at 10.11.12 PM|Screenshot_20190102-101112|stock photo|royalty-free stock photo|Royalty Free Stock Images
click to enlarge|Click here to view larger image|View full size|no image available|Image not found|Photo credit:|© 2014 Getty Images|All rights reserved
http://www.example.com/a/b.html|wp-image-1234.png|1920x1080 wallpaper|HD wallpaper free download|d41d8cd98f00b204e9800998ecf8427e|holiday_0123_b|1234567
550e8400-e29b-41d4-a716-446655440000|copy of IMG_0034|profile picture|thumbnail|Embed this image|Image may contain:|picture taken in 2004|photographed by
uploaded on January 3rd, 2011|Copyright 2012|GOPR0123|Dog stock photo""".replace("\n", "|").split("|")

SPEAKING = """a dog on the beach, photographed on 12 May 2013|The Eiffel Tower at night in May 2013|a man holding a digital camera|Golden Gate Bridge stock photo
stock photo of a dog running|a photograph of two women|a photo of a cat|a picture of a house by the sea|the next train arriving at a station|Boeing 747-400 landing
Canon EOS 5D camera on a wooden table|a blank sheet of paper|Apollo 11 astronauts|a calendar for May|Porsche 911 Turbo|two children play, image by John Smith
1967 Ford Mustang|March of the penguins|screenshot of a web page with a map|red stock car racing|a house with 3 windows|clock showing 10:33 am|Route 66 sign
people click photos at the Taj Mahal|photographed by moonlight, the lake is still|Image of the Virgin Mary|may|a framed picture|film photo|hal 9000""".replace(
    "\n", "|"
).split("|")


@pytest.mark.parametrize("caption", BOILERPLATE)
def test_boilerplate_is_recognised(caption: str) -> None:
    assert is_boilerplate(caption) and is_boilerplate(caption.upper()) and is_boilerplate(f"  {caption} ")


@pytest.mark.parametrize("caption", SPEAKING)
def test_what_says_something_is_no_boilerplate(caption: str) -> None:
    assert not is_boilerplate(caption)


FOREIGN = """Un chien court dans l'herbe verte|Zwei Kinder spielen am Strand mit einem roten Ball|Una mujer con vestido azul delante de la ventana|Casa à venda com jardim e piscina
Een vrouw in een blauwe jurk voor het raam|En hund springer över det gröna gräset|Kobieta w niebieskiej sukience przed oknem|Pencerenin önünde mavi elbiseli bir kadın
Seekor anjing berlari di atas rumput hijau|Một con chó chạy trên bãi cỏ xanh|Собака бежит по зелёной траве|Ένας σκύλος τρέχει στο πράσινο γρασίδι|كلب يركض على العشب الأخضر
夜の東京タワー|夜晚的上海外滩夜景 Bund|푸른 잔디 위를 달리는 개|एक कुत्ता हरी घास पर दौड़ रहा है|สุนัขกำลังวิ่ง|כלב רץ על הדשא הירוק|Ricetta della torta di mele della nonna|Dům na prodej se zahradou a bazénem""".replace(
    "\n", "|"
).split("|")


@pytest.mark.parametrize("caption", FOREIGN)
def test_other_languages_are_recognised(caption: str) -> None:
    assert not is_english(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "Eiffel Tower",
        "Machu Picchu, Peru",
        "Taj Mahal, Agra, India",
        "chihuahua puppy",
        "Café de Flore",
        "A DOG RUNNING ACROSS THE GRASS",
        "12 34",
        "\U0001f415",
        "Tokyo (東京) at night from above",
    ],
)
def test_english_names_and_what_is_too_short_to_judge_are_kept(caption: str) -> None:
    assert is_english(caption)


@given(st.text(st.characters(), max_size=300))
def test_any_text_can_be_judged(caption: str) -> None:
    is_english(caption), is_boilerplate(caption)
    assert caption_reason(caption, OFF) in (None, "empty caption", "broken text")
    assert caption_reason(caption, FilterConfig()) in (
        None,
        "empty caption",
        "broken text",
        "caption too short",
        "caption too long",
        "boilerplate",
        "not English",
        "repetitive caption",
    )


LANGUAGES = {
    "ar": "قطة حمراء تجلس على الطاولة",
    "de": "eine rote Katze sitzt auf dem Tisch über München",
    "hi": "मेज पर एक लाल बिल्ली बैठी है",
    "ja": "赤い猫がテーブルの上に座っている",
    "ru": "красная кошка сидит на столе",
    "zh": "一只红色的猫坐在桌子上",
}


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_any_language_passes_where_none_is_asked_for_and_its_own_list_and_no_other(language: str) -> None:
    caption = LANGUAGES[language]
    assert caption_reason(caption, FilterConfig(english=False)) is None, "words are counted where no spaces stand between them, too"
    assert caption_reason(caption, FilterConfig()) == "not English"
    assert caption_reason(caption, FilterConfig(languages=(language,))) is None
    other = "fr" if language == "de" else "de"
    assert caption_reason(caption, FilterConfig(languages=(other,))) == "another language"
    assert caption_reason(caption, FilterConfig(languages=(other, language))) is None
    assert caption_reason("a red cat sits on the table over there", FilterConfig(languages=(language,))) == "another language"


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"filters\.languages names xx, which the identifier does not know; it knows"):
        caption_reason("a red cat sits on the table", FilterConfig(languages=("en", "xx")))
