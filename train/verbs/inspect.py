"""``launcher.py inspect URL``: shows what is in a data set: counts, sizes, captions, lineage, and a contact sheet of random records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.audit import random_records, statistics
from data_pipeline.audit.statistics import Row, printable
from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.images.crops import decode
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ShardSet, open_set
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, read_manifest
from infra import files, progress, storage
from infra.commands import launcher
from infra.errors import ConfigError, DataError
from infra.text import counted
from train.report.contact_sheet import contact_sheet, thumbnail
from train.report.images import Pixels, png_bytes
from train.verbs.targets import Place, Run, Target, open_run, resolve, schema_of

_WORDS = 30
_ALL_TOKENS = 4096  # the length of captions is measured up to this many tokens; the limit of a run is lower
_SAMPLED = "of {} sampled records"


@dataclass(frozen=True)
class Options:
    """The options of ``inspect``."""

    out: str = ""
    """File name of the contact sheet; empty: inspect-<name>.png in the working directory."""
    samples: int = 500
    """Number of records over which statistics are computed."""
    pictures: int = 48
    """Number of records on the contact sheet; 0: no sheet."""
    seed: int = 0
    tokenizer: str = ""
    """URL of a tokenizer; empty: the run's, or none."""
    run: str = ""
    """Run folder whose dVAE decodes code sets, and whose take-down list applies."""
    version: str = ""
    """Version of a shard set; empty: the newest."""
    takedown: str = ""
    """URL of a take-down list; empty: the run's, or none."""
    count: bool = False
    """Whether to count all records of raw data."""


def main(url: str, options: Options) -> None:
    """Print tables, and write a contact sheet for each data set.

    Raises:
        ConfigError: an option does not apply to what is at the URL.
        DataError: there is nothing at the URL, or it is damaged.
    """
    if options.samples < 1:
        raise ConfigError(f"--samples {options.samples}: at least 1 record is needed.")
    if options.out and not options.out.lower().endswith(".png"):
        raise ConfigError(f"--out {options.out}: the contact sheet is a PNG file; give a name that ends in .png.")
    target = resolve(url)
    if options.version and target.kind != "set":
        raise ConfigError(f"--version {options.version}: {url} is no single shard set; name one, for example {storage.join(url, 'train')}.")
    run = open_run(options.run) if options.run else target.run
    tokenizer = _open_tokenizer(options.tokenizer or next(iter(target.tokenizers), ""), run)
    for each in target.tokenizers:
        _print_tokenizer(each)
    if target.kind == "source":
        _inspect_source(url, options, tokenizer)
    for place in target.sets:
        _inspect_set(place, options, run, tokenizer, _sheet_name(place.url, options.out, target))
    if target.kind == "run" and not target.sets and not target.tokenizers:
        raise DataError(f"{url}: the run holds no data yet; run '{launcher('prepare', url)}' first.")


def _show(rows: Sequence[Row], title: str = "") -> None:
    print(f"\n{title}" if title else "")  # not as the table's title, which would be wrapped to the table's width: a wrapped URL cannot be copied
    progress.table(rows)


def _inspect_set(place: Place, options: Options, run: Run | None, tokenizer: _Measure | None, out: str) -> None:
    url, schema = place.url, schema_of(place.url)
    takedown = options.takedown or (run.cfg.data.takedown if run else "")
    opened = open_set(url, schema, version=options.version or place.version, takedown=takedown)
    _show(_facts(opened), title=url)
    _show(_removed(opened))
    _show(_lineage(opened))
    records = random_records.random_rows(opened, options.samples, options.seed)
    sampled = _SAMPLED.format(len(records))
    if not records:
        print("no records")
        return
    if schema == IMAGE_SCHEMA:
        _show(statistics.share_rows((record["source"] for record in records), "source"), title=sampled)
        _show(statistics.share_rows((record["license"] for record in records), "licence"))
        sizes = [(int(record["width"]), int(record["height"])) for record in records]
        _show(statistics.picture_rows(sizes, [len(record["image"]) for record in records]), title=sampled)
    else:
        _show(statistics.code_rows([record["codes"] for record in records], run.cfg.dvae.vocab if run else 0), title=sampled)
    _print_captions([record["captions"] for record in records], sampled, tokenizer)
    shown = [records[i] for i in _evenly(len(records), options.pictures)]
    pictures = _pictures(shown, schema, opened, run) if shown else []
    if pictures:
        _write_sheet(out, pictures, [record["captions"] for record in shown])


def _facts(opened: ShardSet) -> list[Row]:
    """Counts and sizes of a shard set."""
    parts = opened.parts
    files = [file for part in parts for file in part["files"]]
    per_part = statistics.quantiles([int(part["count"]) for part in parts])
    return [
        {"set": "schema", "value": opened.manifest["schema"]},
        {"set": "records", "value": f"{opened.count:,} to be read, {opened.stored:,} stored"},
        {
            "set": "size",
            "value": f"{counted(sum(file['bytes'] for file in files), 'byte')} in {counted(len(files), 'file')}, {len(opened.shards):,} of them shards",
        },
        {"set": "parts", "value": f"{len(parts):,}"},
        {"set": "records per part", "value": " to ".join(str(per_part.get(name, 0)) for name in ("least", "median", "most"))},
        *({"set": f"from {printable(source)}", "value": f"{count:,} stored"} for source, count in _sources(opened).items()),
    ]


def _sources(opened: ShardSet) -> Counter[str]:
    """Number of stored records for each entry of data.sources."""
    counts: Counter[str] = Counter()
    for part in opened.parts:
        counts[str(part["source"])] += int(part["count"])
    return counts


def _removed(opened: ShardSet) -> list[Row]:
    """Number of stored records that readers hide, for each reason."""
    reasons = opened.manifest["excluded"].get("reasons") or {"excluded (duplicates, repeated ids)": len(opened.excluded)}
    rows: list[Row] = [{"not shown": reason, "records": int(count)} for reason, count in sorted(reasons.items())]
    also = len(opened.taken_down) + len(opened.excluded) - len(opened.removed)
    words = f"taken down ({also} of them excluded anyway)" if also else "taken down"
    return [*rows, {"not shown": words, "records": len(opened.taken_down)}]


def _lineage(opened: ShardSet) -> list[Row]:
    """What the set was made from, by whom, and how."""
    manifest = opened.manifest
    producer, newest = manifest.get("producer") or {}, opened.content_hash[:16]
    names = sorted({name.split("/")[0] for name in storage.list_files(storage.join(opened.url, "versions"))})
    others = ", ".join(name for name in names if name != newest)
    rows: list[Row] = [{"lineage": "content hash", "value": opened.content_hash}]
    rows += [{"lineage": f"made from {kind}", "value": identity} for kind, identity in sorted(manifest["parents"].items())]
    rows.append({"lineage": "commit", "value": producer.get("commit", "unknown")})
    rows.append({"lineage": "packages", "value": ", ".join(f"{name} {version}" for name, version in (producer.get("versions") or {}).items())})
    rows.append({"lineage": "other versions", "value": others or "none"})
    return rows + [{"lineage": f"setting {key}", "value": printable(str(value))} for key, value in sorted(manifest["settings"].items())]


@dataclass(frozen=True)
class _Measure:
    """A tokenizer that does not truncate captions, and the length to which training would truncate them."""

    tokenizer: Tokenizer
    max_tokens: int


def _open_tokenizer(url: str, run: Run | None) -> _Measure | None:
    if not url:
        return None
    vocab = read_manifest(url)["settings"]["vocab"]
    limit = (run.cfg.tokenizer if run else TokenizerConfig()).max_tokens
    return _Measure(load_tokenizer(url, TokenizerConfig(vocab=vocab, max_tokens=_ALL_TOKENS))[0], limit)


def _print_tokenizer(url: str) -> None:
    manifest = read_manifest(url)
    rows: list[Row] = [{"tokenizer": key, "value": manifest[key]} for key in ("schema", "size", "captions", "records", "content_hash")]
    rows += [{"tokenizer": f"made from {kind}", "value": identity} for kind, identity in sorted(manifest["parents"].items())]
    rows += [{"tokenizer": f"setting {key}", "value": printable(str(value))} for key, value in sorted(manifest["settings"].items())]
    rows.append({"tokenizer": "commit", "value": (manifest.get("producer") or {}).get("commit", "unknown")})
    _show(rows, title=url)


def _print_captions(captions: Sequence[Sequence[str]], sampled: str, measure: _Measure | None) -> None:
    tokens, limit = [], 0
    if measure is not None:
        tokens, limit = statistics.token_lengths(captions, measure.tokenizer.encode), measure.max_tokens
    _show(statistics.caption_rows(captions, tokens, limit), title=sampled)
    total = max(1, sum(len(some) for some in captions))
    words = [f"{word} {100 * count / total:.0f} %" for word, count in statistics.frequent_words(captions, _WORDS)]
    _show([{"words in most captions": ", ".join(words)}])


def _inspect_source(url: str, options: Options, measure: _Measure | None) -> None:
    """Statistics of raw data, which is read by the same code as in ``prepare``."""
    from data_pipeline.sources.open_source import open_source

    source = open_source(SourceConfig(url=url), DataConfig())
    found = random_records.sample_source(source, options.samples, options.seed)
    rows: list[Row] = [{"source": "input shards", "value": f"{found.shards:,}, {found.looked_into} of them looked into"}]
    unreadable = found.unreadable
    if options.count:
        records, unreadable = random_records.count_source(source)
        rows.append({"source": "records", "value": f"{records:,}"})
    else:
        rows.append({"source": "records", "value": "not counted; --count reads everything and counts"})
    rows += [{"source": f"unreadable: {reason}", "value": f"{count:,}"} for reason, count in sorted(unreadable.items())]
    _show(rows, title=url)
    if not found.pairs:
        raise DataError(
            f"{url}: none of the first records of {counted(found.looked_into, 'input shard')} can be read; the reasons are in the table above."
        )
    sampled = f"of {counted(len(found.pairs), 'record')}, as many from each of {counted(found.looked_into, 'input shard')}"
    for name, values in (
        ("source", [p.source for p in found.pairs]),
        ("licence", [p.license for p in found.pairs]),
        ("split", [p.split for p in found.pairs]),
    ):
        _show(statistics.share_rows((value or "not given" for value in values), name), title=sampled)
    shown = set(_evenly(len(found.pairs), options.pictures))
    sizes, pictures = [], []
    for index, pair in enumerate(found.pairs):
        picture = _decoded(pair.image)
        if picture is not None:
            sizes.append((picture.shape[1], picture.shape[0]))
        if index in shown:  # kept only as a thumbnail, because whole photographs of all samples would take too much memory
            pictures.append(None if picture is None else thumbnail(picture))
    _show(statistics.picture_rows(sizes, [len(pair.image) for pair in found.pairs]), title=sampled)
    if len(sizes) < len(found.pairs):
        print(f"{len(found.pairs) - len(sizes)} of {len(found.pairs)} sampled images cannot be decoded")
    _print_captions([pair.captions for pair in found.pairs], sampled, measure)
    if options.pictures:
        _write_sheet(options.out or _default_name(url), pictures, [found.pairs[i].captions for i in sorted(shown)])


def _pictures(records: Sequence[dict[str, Any]], schema: str, opened: ShardSet, run: Run | None) -> list[Pixels | None]:
    """The pictures of records. Codes are decoded by the run's dVAE; without one, there is no picture."""
    if schema == IMAGE_SCHEMA:
        decoded = (_decoded(record["image"]) for record in records)
        return [None if picture is None else thumbnail(picture) for picture in decoded]
    if run is None or not run.decoder:
        print("no contact sheet: name a run with an exported dVAE (--run) to see what these codes stand for")
        return []
    from train.verbs.decode_codes import decode_codes  # imported here because it imports torch

    return list(decode_codes([record["codes"] for record in records], opened, run))


def _evenly(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count``, evenly spaced."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _decoded(image: bytes) -> Pixels | None:
    try:
        return decode(image)
    except DataError:
        return None


def _write_sheet(out: str, pictures: Sequence[Pixels | None], captions: Sequence[Sequence[str]]) -> None:
    labels = [printable(some[0] if some else "") + (f" (+{len(some) - 1})" if len(some) > 1 else "") for some in captions]
    with files.elsewhere(files.WITH_OUT):
        storage.write_bytes(out, png_bytes(contact_sheet(pictures, labels)))
    print(f"contact sheet  {out}")


def _sheet_name(url: str, out: str, target: Target) -> str:
    """File name of the sheet of one of several sets: ``--out`` with the set's name before its suffix."""
    if not out:
        return _default_name(url)
    return out if len(target.sets) == 1 else f"{out[:-4]}-{_words(url)}.png"


def _default_name(url: str) -> str:
    return f"inspect-{_words(url)}.png"


def _words(url: str) -> str:
    parts = [part for part in url.split("://")[-1].split("/") if part not in ("", ".", "..")]
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in "-".join(parts[-2:]))
