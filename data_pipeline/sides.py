"""Words that let nobody mirror a picture: those of left and right, and those of what reads in one direction (writing, clocks, flags). By language; no torch.

A word stands for itself; ``*`` at its beginning or end stands for any letters. What is meant otherwise ("right" for correct) costs no more than a picture that is
not mirrored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from data_pipeline.letters import normalise

WORDS: dict[str, tuple[str, ...]] = {
    "de": ("link*", "recht*", "*uhr", "*uhrzeigersinn*", "buchstabe*", "wort*", "wört*", "text*", "schrift*", "*schild*", "zahl*", "ziffer*", "nummer*", "flagge*"),
    "en": (
        "left*", "right*", "*clockwise", "clock*", "watch*", "east*", "west*", "letter*", "word*", "text*", "writ*", "sign*", "number*", "digit*", "flag*", "keycap*",
        "button*", "map*",
    ),
    "es": ("izquierd*", "derech*", "reloj*", "letra*", "palabra*", "texto*", "escrit*", "letrero*", "número*", "bandera*"),
    "fr": ("gauche*", "droit*", "horloge*", "montre*", "lettre*", "mot", "mots", "texte*", "écrit*", "panneau*", "chiffre*", "numéro*", "drapeau*"),
    "it": ("sinistr*", "destr*", "orologi*", "letter*", "parol*", "test*", "scritt*", "cartell*", "numer*", "bandier*"),
    "ja": ("*左*", "*右*", "*時計*", "*文字*", "*数字*", "*看板*", "*旗*"),
    "ko": ("왼*", "오른*", "좌*", "우측*", "시계*", "글자*", "숫자*", "문자*", "표지판*", "*국기*"),
    "nl": ("link*", "recht*", "klok*", "horloge*", "letter*", "woord*", "tekst*", "getal*", "cijfer*", "nummer*", "bord*", "vlag*"),
    "pt": ("esquerd*", "direit*", "relógio*", "letra*", "palavra*", "texto*", "escrit*", "placa*", "número*", "bandeira*"),
    "ru": ("лев*", "слева", "влево", "налево", "прав*", "справа", "вправо", "направо", "час", "часы", "букв*", "слов*", "надпис*", "текст*", "цифр*", "номер*", "флаг*"),
    "zh": ("*左*", "*右*", "*钟*", "*鐘*", "*字*", "*数*", "*旗*"),
}  # fmt: skip


def words(languages: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """The words of languages (none: of all that are known) and further ones, each once, sorted.

    Raises:
        ValueError: a language has no words here, or a word has no letters.
    """
    unknown = sorted(set(languages) - set(WORDS))
    if unknown:
        raise ValueError(
            f"mirror_languages names '{unknown[0]}', for which there are no words; there are for {', '.join(WORDS)}: give its words in mirror_words"
        )
    odd = [word for word in more if not word.strip("*").strip()]
    if odd:
        raise ValueError(f"mirror_words holds '{odd[0]}', which has no letters; give words, with * at an end for any letters")
    return tuple(sorted({word for language in languages or WORDS for word in WORDS[language]} | set(more)))


def names_a_side(captions: Sequence[str], among: Sequence[str]) -> bool:
    """Whether a caption holds one of the words."""
    pattern = _pattern(tuple(among))
    return any(pattern.search(normalise(caption)) for caption in captions)


@cache
def _pattern(among: tuple[str, ...]) -> re.Pattern[str]:
    found = []
    for word in among:
        begin, end = "" if word.startswith("*") else r"(?<!\w)", "" if word.endswith("*") else r"(?!\w)"
        found.append(begin + re.escape(normalise(word.strip("*"))) + end)
    return re.compile("|".join(found))
