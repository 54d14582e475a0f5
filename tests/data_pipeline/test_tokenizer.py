"""The tokenizer: what it learns, and that nothing of a caption is lost."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline import tokenizer as tokenizer_module
from data_pipeline.config import TokenizerConfig
from data_pipeline.shards.part_writer import write_part
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ImageRecord, ShardSet
from data_pipeline.shards.versions import Part, collect, merge
from data_pipeline.tokenizer import Tokenizer, normalise, train_tokenizer
from infra import storage
from infra.errors import ConfigError, DataError
from tests.support.root import ROOT

CAPTIONS = [
    "A flat emoji of a red apple",
    "an outlined drawing of a Red Apple, 3 of them!",
    "keycap 10; the flag of Åland",
    "two apples & 12 redder apples",
    "a 1st place medal",
    "it's a café▁",
] * 5
MODEL = train_tokenizer(CAPTIONS, 400)
TOKENIZER = Tokenizer(MODEL, 4096)


@given(st.text(max_size=200))
@example("\x00 ▁<0x41> 😀 é \u202eabc\u202c <pad><unk> \r\n\t")
@example("İI ΑΣ ﬁ ẞ e\u0301 \ud800x")
@example("   leading  and   trailing   ")
@example("<0x41>")
@example("▁▁ red▁apple")
def test_decoding_gives_back_the_normalised_caption(caption: str) -> None:
    ids, length = TOKENIZER.encode(caption)
    assert TOKENIZER.decode(ids[:length]) == normalise(caption)
    assert ids.dtype == np.int64 and ids.shape == (4096,) and (ids[length:] == 0).all() and (ids[:length] > 1).all()


@given(st.text(max_size=100), st.integers(0, 2**62))
def test_decoding_is_exact_under_dropout_too(caption: str, seed: int) -> None:
    ids, length = TOKENIZER.encode(caption, dropout=0.5, seed=seed)
    assert TOKENIZER.decode(ids[:length]) == normalise(caption)


@given(st.text())
def test_normalising_twice_is_normalising_once(caption: str) -> None:
    assert normalise(normalise(caption)) == normalise(caption)


def test_normalisation_lowers_and_keeps_every_space() -> None:
    assert normalise("  A  Red\tÅPPLE ") == "  a  red\tåpple "


def test_no_piece_mixes_letters_with_anything_else() -> None:
    pieces = [TOKENIZER.decode([index]) for index in range(2, TOKENIZER.size)]
    long = [piece for piece in pieces if len(piece) > 1]
    assert "apple" in long
    assert all(piece.isascii() and piece.isalpha() and piece.islower() for piece in long)


def test_digits_punctuation_and_spaces_are_one_id_each() -> None:
    ids, length = TOKENIZER.encode("apple  12,3!")
    assert [TOKENIZER.decode([index]) for index in ids[:length]] == ["apple", " ", " ", "1", "2", ",", "3", "!"]


def test_a_character_that_training_never_saw_becomes_bytes() -> None:
    ids, length = TOKENIZER.encode("😀")
    assert length == 4 and TOKENIZER.decode(ids[:4]) == "😀"


def test_training_depends_on_neither_order_nor_run() -> None:
    shuffled = list(CAPTIONS)
    random.Random(1).shuffle(shuffled)
    assert train_tokenizer(shuffled, 400) == MODEL


@pytest.mark.parametrize("vocab", [300, 350, 16384])
def test_ids_stay_below_the_vocabulary_however_small_the_corpus(vocab: int) -> None:
    tokenizer = Tokenizer(train_tokenizer(CAPTIONS, vocab), 64)
    assert tokenizer.size <= vocab
    assert all(tokenizer.decode([index]) != "" for index in range(2, tokenizer.size))


def test_frequent_characters_take_at_most_an_eighth_of_the_vocabulary() -> None:
    captions = ["word  " + "".join(chr(0x4E00 + index) for index in range(500))]
    tokenizer = Tokenizer(train_tokenizer(captions, 800), 8)
    pieces = [tokenizer.decode([index]) for index in range(2, tokenizer.size)]
    assert sum("\u4e00" <= piece < "\ua000" for piece in pieces) == 99, "100 with the space, which is more frequent"


def test_dropout_depends_on_the_seed_alone() -> None:
    def encode(seed: int) -> list[int]:
        ids, length = TOKENIZER.encode("an outlined drawing of redder apples", dropout=0.3, seed=seed)
        return [int(index) for index in ids[:length]]

    first = [encode(seed) for seed in range(20)]
    again = [encode(seed) for seed in reversed(range(20))][::-1]
    assert first == again
    assert len({tuple(ids) for ids in first}) > 10
    plain, length = TOKENIZER.encode("an outlined drawing of redder apples")
    assert all(len(ids) >= length for ids in first), "dropout can only split pieces"
    assert TOKENIZER.encode("an outlined drawing of redder apples", dropout=0.0, seed=3)[0].tolist() == plain.tolist()


def test_dropout_splits_about_as_often_as_asked() -> None:
    _, whole = TOKENIZER.encode("apple")
    assert whole == 1
    split = sum(TOKENIZER.encode("apple", dropout=0.1, seed=seed)[1] > 1 for seed in range(1000))
    # 'apple' takes a few merges, each skipped with probability 0.1: between 1 - 0.9 ** 1 and 1 - 0.9 ** 4, and some.
    assert 60 < split < 500


def test_dropout_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout = 0.1 needs a seed"):
        TOKENIZER.encode("apple", dropout=0.1)


def test_long_captions_are_cut_and_counted() -> None:
    tokenizer = Tokenizer(MODEL, 4)
    ids, length = tokenizer.encode("red apple red apple")
    assert length == 4 and tokenizer.decode(ids) == "red apple "
    tokenizer.encode("red")
    tokenizer.encode("red red.")
    assert (tokenizer.encoded, tokenizer.truncated) == (3, 1)


def test_a_megabyte_is_only_read_as_far_as_it_counts() -> None:
    tokenizer = Tokenizer(MODEL, 16)
    ids, length = tokenizer.encode("1" * 1_000_000)
    assert length == 16 and tokenizer.decode(ids) == "1" * 16


def test_ids_out_of_range_are_refused_and_broken_bytes_are_not() -> None:
    with pytest.raises(ValueError, match=rf"\[{TOKENIZER.size}\] are out of range: expected 0 to {TOKENIZER.size - 1}"):
        TOKENIZER.decode([5, TOKENIZER.size])
    first_byte = TOKENIZER.encode("😀")[0][0]
    assert TOKENIZER.decode([first_byte, 0, 0]) == "\ufffd"


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.vocab = 284: .* need more than 284"):
        train_tokenizer(CAPTIONS, 284)


def test_captions_without_letters_are_refused() -> None:
    with pytest.raises(DataError, match=r"no letter from a to z"):
        train_tokenizer(["123", "汉字"], 400)


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(DataError, match=r"not a tokenizer model .* run the stage 'tokenizer' again"):
        Tokenizer(b"nonsense", 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"byte_fallback": False}, "0 of 256 bytes, where 0, 1 and 256 belong"),
        ({"pad_id": 5, "unk_id": 0}, "padding 5, unknown 0"),
        ({"pad_id": -1}, "padding -1, unknown 1"),
    ],
)
def test_a_model_that_would_lose_characters_in_silence_is_refused(changed: dict[str, Any], message: str) -> None:
    """Of a foreign run: it would read every character that it does not know as 'unknown'."""
    model = io.BytesIO()
    usual: dict[str, Any] = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "byte_fallback": True, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=330, hard_vocab_limit=False, minloglevel=2, **usual | changed
    )
    with pytest.raises(DataError, match=message):
        Tokenizer(model.getvalue(), 8)


def test_a_model_without_anything_is_refused() -> None:
    with pytest.raises(DataError, match="not a tokenizer model"):
        Tokenizer(b"", 8)


def image_set(url: str, captions: list[str]) -> ShardSet:
    write_part(url, "inputs", [ImageRecord(str(i), [c], b"", 1, 1, "s", "l", "g", "train") for i, c in enumerate(captions)])
    parts = [Part("inputs", "s")]
    return merge(url, parts, collect(url, parts, "prepare"), IMAGE_SCHEMA, {})


def test_the_stage_writes_once_and_again_when_its_images_change(tmp_path: Path) -> None:
    config, url = TokenizerConfig(vocab=400, max_tokens=16), str(tmp_path / "tokenizer")
    first = tokenizer_module.run(config, image_set(str(tmp_path / "a"), CAPTIONS), url, {"commit": "x"})
    assert first["captions"] == first["records"] == first["captions_measured"] == len(CAPTIONS)
    lengths = [Tokenizer(storage.read_bytes(f"{url}/tokenizer.model"), 1000).encode(caption)[1] for caption in CAPTIONS]
    assert first["share_truncated"] == sum(length > 16 for length in lengths) / len(lengths) > 0
    assert first["tokens_per_caption"] == round(sum(min(length, 16) for length in lengths) / len(lengths), 3)
    storage.delete(f"{url}/tokenizer.model")
    assert tokenizer_module.run(config, image_set(str(tmp_path / "b"), CAPTIONS), url, {"commit": "y"}) == first, "equal captions: nothing to do"
    assert not storage.exists(f"{url}/tokenizer.model")
    other = tokenizer_module.run(config, image_set(str(tmp_path / "c"), ["a blue pear"]), url)
    assert other["content_hash"] != first["content_hash"]
    tokenizer, manifest = tokenizer_module.load_tokenizer(url, config)
    assert manifest == other and tokenizer.max_tokens == 16
    assert tokenizer.encode("pear")[1] == 1


def test_a_tokenizer_that_is_missing_damaged_or_of_another_size_is_refused(tmp_path: Path) -> None:
    config, url = TokenizerConfig(vocab=400, max_tokens=16), str(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"no tokenizer here .* run the stage 'tokenizer' first"):
        tokenizer_module.load_tokenizer(url, config)
    tokenizer_module.run(config, image_set(str(tmp_path / "a"), CAPTIONS), url)
    with pytest.raises(DataError, match=r"trained for tokenizer.vocab = 400, this run has 500"):
        tokenizer_module.load_tokenizer(url, TokenizerConfig(vocab=500, max_tokens=16))
    manifest = storage.read_json(f"{url}/manifest.json")
    storage.write_json(f"{url}/manifest.json", manifest | {"settings": manifest["settings"] | {"vocab": 300}})
    with pytest.raises(DataError, match=r"tokenizer.model: has 3\d\d pieces, more than tokenizer.vocab = 300"):
        tokenizer_module.load_tokenizer(url, TokenizerConfig(vocab=300, max_tokens=16))
    storage.write_json(f"{url}/manifest.json", manifest)
    storage.write_bytes(f"{url}/tokenizer.model", b"damaged")
    with pytest.raises(DataError, match=r"tokenizer.model: damaged, .* delete .* run the stage 'tokenizer' again"):
        tokenizer_module.load_tokenizer(url, config)


def test_our_merges_without_dropout_are_sentencepieces_own() -> None:
    for word in sorted(
        {word for caption in CAPTIONS for word in caption.split() if word.isalpha() and word.isascii()} | {"appleapple", "zzz", "outlinedredder"}
    ):
        assert TOKENIZER._sampled(word.lower(), 0.0, lambda: 0.0) == TOKENIZER._known(word.lower()), word


def test_equal_seeds_drop_the_same_merges_in_another_process() -> None:
    """sentencepiece's own sampling adds a thread's address to the seed, and fails here."""
    program = """
import sys
from data_pipeline.tokenizer import Tokenizer
tokenizer = Tokenizer(sys.stdin.buffer.read(), 64)
print([tokenizer.encode("an outlined drawing of redder apples", 0.3, seed)[0].tolist() for seed in range(20)])
"""
    there = subprocess.run([sys.executable, "-c", program], input=MODEL, capture_output=True, check=True, cwd=ROOT).stdout.decode().strip()
    tokenizer = Tokenizer(MODEL, 64)
    assert there == str([tokenizer.encode("an outlined drawing of redder apples", 0.3, seed)[0].tolist() for seed in range(20)])


LANGUAGES = {
    "ar": "قطة حمراء تجلس على الطاولة",
    "de": "eine rote Katze sitzt auf dem Tisch über München",
    "hi": "मेज पर एक लाल बिल्ली बैठी है",
    "ja": "赤い猫がテーブルの上に座っている",
    "ru": "красная кошка сидит на столе",
    "zh": "一只红色的猫坐在桌子上",
}
ANY = Tokenizer(train_tokenizer([*LANGUAGES.values()] * 8, 700, "unicode"), 512, "unicode")


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_with_letters_of_all_scripts_a_caption_of_any_language_takes_few_tokens_and_comes_back(language: str) -> None:
    caption = LANGUAGES[language]
    for dropout in (0.0, 0.5):
        ids, length = ANY.encode(caption, dropout, 1)
        assert ANY.decode(ids[:length]) == normalise(caption)
    ids, length = ANY.encode(caption)
    paper, paper_length = TOKENIZER.encode(caption)
    assert TOKENIZER.decode(paper[:paper_length]) == normalise(caption), "not lost by the paper's rule either, but long"
    assert length <= len(caption) / 2 < paper_length and not ANY.spelled_in_bytes(caption)


@given(st.text(max_size=200))
@example("x² ½ Ⅷ e\u0301 मे\u0947 \u0301a 猫ab12")
def test_letters_of_all_scripts_lose_nothing(caption: str) -> None:
    for dropout in (0.0, 0.5):
        ids, length = ANY.encode(caption, dropout, 1)
        assert ANY.decode(ids[:length]) == normalise(caption) or length == 512


def test_no_piece_mixes_letters_of_any_script_with_anything_else() -> None:
    pieces = [ANY.decode([index]) for index in range(2, ANY.size)]
    assert all(len(piece) <= 1 or all(unicodedata.category(letter)[0] in "LM" for letter in piece) for piece in pieces if "\ufffd" not in piece)


def test_more_letters_than_the_vocabulary_has_room_for_become_bytes() -> None:
    captions = ["".join(chr(0x4E00 + (number * 7 + place) % 2000) for place in range(20)) for number in range(300)]
    tokenizer = Tokenizer(train_tokenizer(captions, 700, "unicode"), 512, "unicode")
    ids, length = tokenizer.encode(captions[0])
    assert tokenizer.decode(ids[:length]) == captions[0] and tokenizer.size <= 700


def test_captions_of_another_script_are_refused_by_the_papers_rule_before_anything_long_begins(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r'captions hold no letter from a to z, .*; set tokenizer\.letters = "unicode" for other scripts'):
        train_tokenizer([LANGUAGES["ru"]], 400)
    train_tokenizer([LANGUAGES["de"]], 400)
    assert "not from a to z" not in caplog.text
    train_tokenizer([LANGUAGES["de"], LANGUAGES["ru"] * 3], 400)
    assert "% of the letters in captions are not from a to z" in caplog.text
    with pytest.raises(DataError, match="captions hold no letter, so there is nothing"):
        train_tokenizer(["12 34"], 400, "unicode")


@pytest.mark.parametrize("caption", ["", "a red fox", "ünlikely 狐狸!", "A RED\0fox  " * 9])
def test_tokens_are_counted_beyond_the_cut_and_what_has_no_piece_is_named(caption: str) -> None:
    known = ["a red fox!", "two green trees"]
    model = train_tokenizer(known, 300)
    short, long = Tokenizer(model, 4), Tokenizer(model, 1000)
    assert short.count(caption) == long.count(caption) == long.encode(caption)[1]
    spelled = short.spelled_in_bytes(caption)
    assert spelled == [character for character in dict.fromkeys(normalise(caption)) if character not in "".join(known)]
