"""Byte-pair encoding of captions (paper B.2): training, encoding with BPE dropout, exact decoding. Only this module imports sentencepiece.

Before merges are applied, text is split as the paper's author describes: it is lower-cased and split into runs of the letters a to z (with
tokenizer.letters = "unicode": of the letters and marks of all scripts) and single other characters. Only runs of letters go through sentencepiece's merges, so
no piece mixes letters with anything else. Any other character is a piece of its own if it is frequent enough to be in the vocabulary, else it is spelled as
its UTF-8 bytes. So every caption can be encoded, and nothing in a caption can be taken for a control symbol.

Ids: 0 padding, 1 unknown (never produced), characters other than letters, 256 bytes, merges and letters.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from pydantic import Field

from data_pipeline.config import TokenizerConfig
from data_pipeline.letters import A_TO_Z, Letters, common_runs, is_run, split
from data_pipeline.letters import normalise as normalise
from data_pipeline.shards.shard_set import ShardSet
from infra import schemas, storage, stored
from infra.digests import digest
from infra.errors import ConfigError, DataError, MissingError
from infra.stored import Count, Sha256, Stored

log = logging.getLogger(__name__)

PAD = 0
UNKNOWN = 1
MODEL = "tokenizer.model"
MANIFEST = "manifest.json"
_LETTERS = A_TO_Z
_SPACE = "\u2581"  # sentencepiece writes a space in a piece as this character
_CHARACTER_SHARE = 8  # at most 1/8 of the vocabulary goes to characters other than letters
_MEASURED = 50_000  # size of the sample of captions whose lengths are measured
_NUM_FIXED = 2 + 256 + len(_LETTERS)  # padding, unknown, bytes, letters


def train_tokenizer(captions: Iterable[str], vocab: int, letters: Letters = "a-z") -> bytes:
    """Train a model on captions. Equal captions (in any order), ``vocab`` and ``letters`` give equal bytes.

    If there are too few captions for ``vocab`` pieces, the model has fewer.

    Raises:
        ConfigError: ``vocab`` has no room for bytes and letters.
        DataError: there is no letter in any caption.
    """
    if vocab <= _NUM_FIXED:
        raise ConfigError(f"tokenizer.vocab = {vocab}: padding, unknown, 256 bytes and 26 letters need more than {_NUM_FIXED}.")
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(split(letters).findall(normalise(caption)))
    runs = {word: count for word, count in words.items() if is_run(word, letters)}
    _refuse_other_scripts(words, runs, letters)
    others = {word: count for word, count in words.items() if word not in runs and _printable(word)}
    room = min(vocab // _CHARACTER_SHARE, vocab - _NUM_FIXED - 1)
    characters = sorted(sorted(others, key=lambda character: (-others[character], character))[:room])
    if letters == "unicode":
        runs = dict(common_runs(runs, (vocab - _NUM_FIXED - len(characters)) // 2))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Words with their counts: sentencepiece never sees a space, so it cannot learn a merge across one.
        sentence_iterator=(f"{word}\t{count}" for word, count in sorted(runs.items())),
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        hard_vocab_limit=False,
        pad_id=PAD,
        unk_id=UNKNOWN,
        bos_id=-1,
        eos_id=-1,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        required_chars=_LETTERS,
        user_defined_symbols=[_SPACE if character == " " else character for character in characters],
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _refuse_other_scripts(words: Counter[str], runs: Mapping[str, int], letters: Letters) -> None:
    """Refuse captions without any letter, and warn if most letters belong to other scripts: they would be encoded as bytes (a Russian word of three as six).

    Raises:
        DataError: no caption contains a letter by ``tokenizer.letters``.
    """
    others = sum(count for word, count in words.items() if word not in runs and word.isalpha())
    if not runs:
        advice = 'set tokenizer.letters = "unicode" for other scripts' if others else "check the captions of data.sources"
        raise DataError(
            f"captions hold no letter{' from a to z' if letters == 'a-z' else ''}, so there is nothing to train a tokenizer on; {advice}."
        )
    own = sum(len(word) * count for word, count in runs.items())
    if others > own:
        log.warning(
            '%.0f %% of the letters in captions are not from a to z; set tokenizer.letters = "unicode" for them', 100 * others / (own + others)
        )


def _printable(character: str) -> bool:
    # U+2581 stands for a space in sentencepiece, so it is spelled as bytes; so are spaces other than ' ' and control characters.
    return character == " " or (character != _SPACE and character.isprintable() and not character.isspace())


class Tokenizer:
    """Encodes captions to ids, and decodes ids to text."""

    def __init__(self, model: bytes, max_tokens: int, letters: Letters = "a-z") -> None:
        """
        Args:
            model: the bytes that ``train_tokenizer`` returned.
            max_tokens: length of encoded captions; longer ones are cut and counted in ``truncated``.
            letters: the same as in the training of the model.

        Raises:
            DataError: the bytes are not a sentencepiece model.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"not a tokenizer model ({error}); delete the tokenizer folder and run the stage 'tokenizer' again.") from error
        self.max_tokens, self.letters = max_tokens, letters
        self.encoded = 0
        """Number of captions that this object has encoded."""
        self.truncated = 0
        """Number of these that were cut at ``max_tokens``."""
        pieces = [self._model.id_to_piece(index) for index in range(self._model.get_piece_size())]
        self._bytes = [bytes([int(piece[3:5], 16)]) if self._model.is_byte(index) else piece.encode() for index, piece in enumerate(pieces)]
        byte_ids = [self._model.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        found = (self._model.pad_id(), self._model.unk_id(), sum(map(self._model.is_byte, byte_ids)) if pieces else 0)
        if found != (PAD, UNKNOWN, 256):  # characters that are in no piece would silently become 'unknown'
            raise DataError(
                "not a tokenizer model of this project: padding {}, unknown {}, and {} of 256 bytes, where {}, {} and 256 belong; run the stage 'tokenizer' "
                "again.".format(*found, PAD, UNKNOWN)
            )
        self._bytes[PAD] = self._bytes[UNKNOWN] = b""
        self._byte_ids = byte_ids
        self._character_ids = {piece: index for index, piece in enumerate(pieces) if len(piece) == 1 and piece not in _LETTERS}
        space = self._character_ids.pop(_SPACE, None)
        if space is not None:
            self._character_ids[" "] = space
            self._bytes[space] = b" "
        self._words: dict[str, list[int]] = {}
        self._merges = {
            piece: (index, self._model.get_score(index))
            for index, piece in enumerate(pieces)
            if split(letters).fullmatch(piece) and is_run(piece, letters)
        }
        """Piece of letters -> id and score; the pair with the highest score is merged first."""

    @property
    def size(self) -> int:
        """Number of ids; all ids are below it."""
        return len(self._bytes)

    def encode(self, caption: str, dropout: float = 0.0, seed: int | None = None) -> tuple[NDArray[np.int64], int]:
        """Ids of one caption.

        Args:
            caption: any string.
            dropout: probability with which each possible merge is skipped (BPE dropout); 0 for inference.
            seed: seed of the dropout, needed if ``dropout`` is not 0. Equal seeds give equal ids, whatever was encoded before.

        Returns:
            Ids, int64 [max_tokens], padded with 0 at the end; and how many of them belong to the caption.

        Raises:
            ValueError: dropout without a seed.
        """
        if dropout and seed is None:
            raise ValueError(f"dropout = {dropout} needs a seed, for example infra.seeds.derive(run_seed, 'bpe', epoch, id)")
        draw = random.Random(seed).random
        ids: list[int] = []
        for word in split(self.letters).findall(normalise(caption)):
            if len(ids) > self.max_tokens:
                break
            if is_run(word, self.letters):
                ids += self._sampled(word, dropout, draw) if dropout else self._known(word)
            else:
                character = self._character_ids.get(word)
                ids += [character] if character is not None else [self._byte_ids[value] for value in word.encode()]
        self.encoded += 1
        self.truncated += len(ids) > self.max_tokens
        length = min(len(ids), self.max_tokens)
        out = np.full(self.max_tokens, PAD, np.int64)
        out[:length] = ids[:length]
        return out, length

    def spelled_in_bytes(self, caption: str) -> list[str]:
        """The distinct characters of a caption, in order, that are not in the vocabulary and therefore are encoded as UTF-8 bytes."""
        words = split(self.letters).findall(normalise(caption))
        units = (unit for word in words for unit in (word if is_run(word, self.letters) else (word,)))
        return list(dict.fromkeys(unit for unit in units if unit not in self._merges and unit not in self._character_ids))

    def count(self, caption: str) -> int:
        """Number of tokens of a caption before it is cut at ``max_tokens``."""
        words = split(self.letters).findall(normalise(caption))
        return sum(
            len(self._known(word)) if is_run(word, self.letters) else 1 if word in self._character_ids else len(word.encode()) for word in words
        )

    def _sampled(self, word: str, dropout: float, draw: Callable[[], float]) -> list[int]:
        """BPE of a word in which each possible merge is skipped with probability ``dropout`` (Provilkov et al. 2020).

        sentencepiece's own sampling is not used: it mixes the address of its thread into the seed, so that equal seeds give different results in each process.
        """
        # The word starts as single letters. parts[i] is the piece that begins at letter i ("" once it has been merged into the one before), and after and before
        # link each piece to its neighbours.
        parts, count = list(word), len(word)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        # Merges that are possible now, best score first; equal scores from left to right, as sentencepiece does.
        waiting: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            if left >= 0 and after[left] < count:
                piece = parts[left] + parts[after[left]]
                if piece in self._merges:
                    heapq.heappush(waiting, (-self._merges[piece][1], left, piece))

        for left in range(count - 1):
            offer(left)
        while waiting:
            _, left, piece = heapq.heappop(waiting)
            right = after[left]
            if not parts[left] or right >= count or parts[left] + parts[right] != piece:
                continue  # outdated: one of the two pieces has been merged with another one meanwhile
            if draw() < dropout:
                continue  # this merge is skipped; a later merge beside it may offer the pair again
            parts[left], parts[right], after[left] = piece, "", after[right]
            if after[left] < count:
                before[after[left]] = left
            offer(before[left])
            offer(left)
        # A letter that did not occur in the training captions has no piece, and is spelled as bytes.
        ids: list[int] = []
        for part in filter(None, parts):
            ids += [self._merges[part][0]] if part in self._merges else [self._byte_ids[value] for value in part.encode()]
        return ids

    def _known(self, word: str) -> list[int]:
        ids = self._words.get(word)
        if ids is None:
            ids = list(self._model.encode(word))
            if len(self._words) < 65536 and len(word) < 64:
                self._words[word] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; padding is skipped, and bytes that are not UTF-8 (sampled sequences may contain such) become U+FFFD.

        Raises:
            ValueError: an id is out of range.
        """
        indices = [int(index) for index in ids]
        bad = [index for index in indices if not 0 <= index < self.size]
        if bad:
            raise ValueError(f"token ids {bad[:5]} are out of range: expected 0 to {self.size - 1}")
        return b"".join(self._bytes[index] for index in indices).decode("utf-8", "replace")


def settings_of(config: TokenizerConfig) -> dict[str, Any]:
    """What a tokenizer depends on besides its captions, as its manifest says it."""
    found = {"vocab": config.vocab, "algorithm": 1, "sentencepiece": sentencepiece.__version__}
    return found if config.letters == "a-z" else found | {"letters": config.letters}


def run(config: TokenizerConfig, images: ShardSet, url: str, producer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Stage 'tokenizer': train on all captions of the training images, and write model and manifest (last). A finished one with the same inputs is kept.

    Args:
        config: the section ``tokenizer``.
        images: the image set of the training split.
        url: place of the tokenizer.
        producer: commit and versions, for the manifest.

    Returns:
        The manifest.

    Raises:
        ConfigError: tokenizer.vocab is too small.
        DataError: the captions hold no letter, or the images cannot be read.
    """
    place = storage.join(url, MANIFEST)
    parents, settings = {"images": images.content_hash}, settings_of(config)
    if storage.exists(place):
        former = read_manifest(url)
        if former.get("parents") == parents and former.get("settings") == settings:
            return former
        storage.delete(place)
    num_captions, num_records, sample = 0, 0, list[str]()
    draw = random.Random(0).randrange

    def captions() -> Iterable[str]:
        nonlocal num_captions, num_records
        for several in images.captions():
            num_records += 1
            for caption in several:
                num_captions += 1
                if len(sample) < _MEASURED:
                    sample.append(caption)
                elif (place := draw(num_captions)) < _MEASURED:  # reservoir sampling: every caption is equally likely to be in the sample
                    sample[place] = caption
                yield caption

    model = train_tokenizer(captions(), config.vocab, config.letters)
    tokenizer = Tokenizer(model, config.max_tokens, config.letters)
    manifest: dict[str, Any] = {
        "schema": schemas.TOKENIZER,
        "sha256": hashlib.sha256(model).hexdigest(),
        "size": tokenizer.size,
        "captions": num_captions,
        "records": num_records,
        "parents": parents,
        "settings": settings,
    }
    manifest |= {"content_hash": digest(manifest), "producer": producer or {}, **_lengths(tokenizer, sample)}
    storage.write_bytes(storage.join(url, MODEL), model)
    storage.write_json(place, manifest)
    log.info("tokenizer of %d pieces from %d captions", manifest["size"], num_captions)
    return manifest


def _lengths(tokenizer: Tokenizer, captions: list[str]) -> dict[str, Any]:
    """The mean length of captions in tokens, and the share that is cut at tokenizer.max_tokens."""
    lengths = [tokenizer.encode(caption)[1] for caption in captions]
    return {
        "captions_measured": len(lengths),
        "tokens_per_caption": round(float(np.mean(lengths)), 3),
        "share_truncated": tokenizer.truncated / len(lengths),
    }


class _Settings(Stored):
    vocab: Annotated[int, Field(gt=0, lt=1 << 31)]


class _Manifest(Stored):
    schema_: str = Field(alias="schema")
    sha256: Sha256
    content_hash: Sha256
    size: Count
    captions: Count
    records: Count
    parents: dict[str, str]
    settings: _Settings
    producer: dict[str, Any] = Field(default_factory=dict)


def read_manifest(url: str) -> dict[str, Any]:
    """The manifest of the tokenizer at a URL; a DataError if it is missing or damaged."""
    return stored.read(storage.join(url, MANIFEST), _Manifest, f"delete {url} and run the stage 'tokenizer' again")


def load_tokenizer(url: str, config: TokenizerConfig) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a finished stage, and its manifest.

    Raises:
        DataError, ConfigError: it is missing or damaged, was trained with another vocabulary size or other letters, or has another schema.
    """
    place = storage.join(url, MANIFEST)
    try:
        manifest = read_manifest(url)
    except MissingError:
        raise DataError(f"{url}: no tokenizer here ({MANIFEST} is missing); run the stage 'tokenizer' first.") from None
    schemas.require(manifest.get("schema"), schemas.TOKENIZER, place, "delete it and run the stage again: launcher.py tokenizer RUN_FOLDER")
    if manifest["settings"]["vocab"] != config.vocab:
        raise DataError(
            f"{url}: trained for tokenizer.vocab = {manifest['settings']['vocab']}, this run has {config.vocab}; "
            "change tokenizer.vocab or run 'tokenizer' again."
        )
    trained = manifest["settings"].get("letters", "a-z")
    if trained != config.letters:
        raise DataError(
            f"{url}: trained for tokenizer.letters = '{trained}', this run has '{config.letters}'; change tokenizer.letters or run 'tokenizer' again."
        )
    model = storage.read_bytes(storage.join(url, MODEL))
    if hashlib.sha256(model).hexdigest() != manifest["sha256"]:
        raise DataError(f"{storage.join(url, MODEL)}: damaged, its SHA-256 is not the manifest's; delete {url} and run the stage 'tokenizer' again.")
    tokenizer = Tokenizer(model, config.max_tokens, config.letters)
    if tokenizer.size > config.vocab:  # the transformer has no embeddings of more
        raise DataError(
            f"{storage.join(url, MODEL)}: has {tokenizer.size:,} pieces, more than tokenizer.vocab = {config.vocab:,}; run 'tokenizer' again."
        )
    return tokenizer, manifest
