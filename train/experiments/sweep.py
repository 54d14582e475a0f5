"""Compares options of stage dalle with each other, at equal time or equal tokens, with paired seeds: ``python -m train.experiments.sweep FILE.toml``.

The file says which run's codes are used (its stages tokenizer, dvae and encode are finished), and what the arms change in its configuration:

    name = "small-data"                                  # figures: docs/experiments/sweep-NAME.json
    run = "runs/pairs64"
    seeds = [0, 1, 2]                                    # of weights, order of samples and everything else random; every arm gets each
    minutes = 10.0                                       # or tokens = 5_000_000: positions of the stream, padding included
    cores = 1                                            # processes of a training
    overrides = ["dalle.embedding_scale=30"]             # for all arms
    drawings = 500                                       # judge by drawings of so many held-out captions, too; 0 or left out: by losses alone

    [arms]                                               # the first is the one that the others are compared with
    base = []
    "weight decay 0.3" = ["dalle_fit.weight_decay=0.3"]

With minutes, two probes find how many updates of an arm fit into them, once for all its seeds; updates, the loading of batches and checkpoints count as time,
evaluations and the start do not. Warm-up and schedule fill the updates, whatever their number. The figures are written after each training, with its seed, commit
and minutes; the same command goes on with the trainings that are missing, so arms and seeds can be added later. A training that was interrupted is begun anew. One
that diverged is recorded as such. ``python -m train.experiments.page --render`` makes the page.

An arm with keys of dvae or dvae_fit makes its own codes first: stages dvae and encode, with the seed of the training. Nats per code of different codes say
nothing about each other; drawings do. These, and sweeps with drawings, keep their folders by name, so that what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from infra import storage, stored
from infra.config import Section, differences, parse, validate
from infra.errors import ConfigError, ExitCode, ReportedError
from infra.repository import DOCS
from infra.run_folder import RunFolder, producer
from train.config import load_run
from train.experiments import peer, sweep_drawings, sweep_page
from train.loop.metrics import read_metrics
from train.run import places
from train.stages import evaluate_drawings

_TAIL = 0.1
"""The share of the updates, the last ones, whose mean is called the training loss."""
_OF_THE_SWEEP = ("dalle_fit.steps", "run.seed", "run.name", "run.root")
"""Keys that the runner sets itself."""


class SweepFile(Section):
    """What FILE.toml may say."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=80)
    """Name of the file of figures."""
    run: str
    """Folder of the run whose codes and tokenizer are used."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of each arm."""
    minutes: float | None = Field(default=None, gt=0)
    """Training time of each training; or give tokens."""
    tokens: int | None = Field(default=None, gt=0)
    """Positions of the stream of each training, padding included; or give minutes."""
    probe_minutes: float | None = Field(default=None, gt=0)
    """Training time of the probe of an arm; a twentieth of the minutes if not given."""
    cores: int = Field(default=1, gt=0, le=1024)
    """Processes of a training."""
    overrides: tuple[str, ...] = ()
    """section.key=value, for all arms."""
    drawings: int = Field(default=0, ge=0)
    """Captions of held-out concepts that are drawn after each training to judge it; 0: none. Takes the run's stage clip."""
    arms: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Name -> section.key=value of this arm; the first arm is the one that the others are compared with."""

    @model_validator(mode="after")
    def _is_a_sweep(self) -> Self:
        if (self.minutes is None) == (self.tokens is None):
            raise ValueError("give one of minutes and tokens: what every training gets as much of")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} names a seed twice")
        for word in [*self.overrides, *(word for words in self.arms.values() for word in words)]:
            if (key := word.partition("=")[0]) in _OF_THE_SWEEP:
                raise ValueError(f"'{word}': the sweep sets {key} itself, from seeds, minutes and tokens")
            if self.minutes is not None and sweep_page.makes_codes([word]):
                raise ValueError(f"'{word}' makes other codes, on which no probe can be made beforehand: give tokens instead of minutes")
        return self

    def words(self, arm: str) -> list[str]:
        """What an arm changes in the configuration of the run."""
        return [*self.overrides, *self.arms[arm]]

    def own_codes(self, arm: str) -> bool:
        """Whether an arm's codes are not those of the run."""
        return sweep_page.makes_codes(self.words(arm))


def read(path: Path) -> SweepFile:
    """The sweep in a file.

    Raises:
        ConfigError: there is no such file, or what it says is not accepted.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a TOML file, as train/experiments/small-data.toml is one.") from error
    return validate(SweepFile, parse(text, str(path)), str(path))


class Sweep:
    """The trainings of a file, and their figures."""

    def __init__(self, given: SweepFile, out: Path) -> None:
        """Read all configurations and the figures that are there.

        Raises:
            ConfigError: an arm's configuration is wrong; or the figures are of other settings, or of an arm with other overrides.
        """
        self.given, self.out = given, out
        url = given.run if storage.is_remote(given.run) else str(Path(given.run).resolve())
        self.run = RunFolder(url)
        self.configs = {arm: load_run(url, given.words(arm)) for arm in given.arms}
        if given.drawings:
            places.require(self.run, "clip")
            for cfg in self.configs.values():
                evaluate_drawings.check(cfg, self.run)
        common = peer.settings_of(load_run(url, list(given.overrides)), self.run, given.minutes or 0.0, given.cores, given.overrides)
        left_out = {"seed", "minutes"}
        extent: dict[str, Any] = {"minutes": given.minutes} if given.minutes else {"tokens": given.tokens}
        extent |= {"drawings": given.drawings} if given.drawings else {}
        settings = {key: value for key, value in common.items() if key not in left_out} | extent
        self.found: dict[str, Any] = {"kind": "sweep", "name": given.name, "settings": settings, "arms": {}, "runs": []}
        if out.exists():
            self._go_on(_figures(out))
        self.found["base"] = next(iter(given.arms))
        for arm, words in given.arms.items():
            self.found["arms"].setdefault(arm, {"overrides": list(words)})

    def _go_on(self, before: dict[str, Any]) -> None:
        changed = differences(before["settings"], self.found["settings"])
        for arm, words in self.given.arms.items():
            if arm in before["arms"]:
                changed += differences({arm: before["arms"][arm]["overrides"]}, {arm: list(words)})
        if changed:
            raise ConfigError(
                f"{self.out} holds trainings of another sweep; give another name, or remove it:\n  " + "\n  ".join(changed) + "\n  (file -> given)"
            )
        self.found |= {"arms": before["arms"], "runs": before["runs"]}

    def missing(self) -> list[tuple[str, int]]:
        """Arms and seeds that have no figures yet, all arms of a seed before the next seed, so that what is there can be compared."""
        there = {(one["arm"], one["seed"]) for one in self.found["runs"]}
        return [(arm, seed) for seed in self.given.seeds for arm in self.given.arms if (arm, seed) not in there]

    def plan(self) -> list[str]:
        """What ``go`` would do, for people."""
        missing, given = self.missing(), self.given
        lines = []
        for arm, words in given.arms.items():
            seeds = [seed for name, seed in missing if name == arm]
            said = f"seeds to train: {', '.join(map(str, seeds))}" if seeds else "is there"
            lines.append(f"{arm}: {' '.join(words) or 'no changes'}; {said}")
        probed = sum("updates" not in self.found["arms"][arm] for arm in {name for name, _ in missing})
        minutes = (
            ""
            if given.minutes is None
            else f", {len(missing) * given.minutes:g} minutes of training"
            + (f" and about {probed * (given.probe_minutes or given.minutes / 20):g} of probes" if probed else "")
        )
        return [*lines, f"{len(missing)} trainings to go{minutes}; evaluations and starts come on top"]

    def go(self) -> None:
        """Make the trainings that are missing, and write the figures after each."""
        for arm, seed in self.missing():
            updates, precision = self._extent(arm)
            self.found["runs"].append(one := self._train(arm, seed, updates, precision))
            self._write()
            said = f"{one['nats_per_code']:.4f} nats per code" if one["end"] == "done" else one["end"]
            print(f"{arm}, seed {seed}: {said}, {len(self.missing())} trainings to go", flush=True)

    def _extent(self, arm: str) -> tuple[int, str]:
        """How many updates an arm's trainings have, and their precision; by probes, where time is equal."""
        cfg, of_arm, given = self.configs[arm], self.found["arms"][arm], self.given
        if given.tokens is not None:
            updates = round(given.tokens / (cfg.dalle_fit.batch * cfg.stream_shape().states))
            return max(1, updates), cfg.dalle_fit.precision
        if "updates" not in of_arm:
            assert given.minutes is not None
            probe = given.probe_minutes or given.minutes / 20
            words = given.words(arm)
            updates, rates, precision = peer.updates_within(cfg, self.run, words, given.minutes, probe, given.cores)
            of_arm |= {"updates": updates, "updates_per_s": rates, "precision": precision}
            self._write()
        return of_arm["updates"], of_arm["precision"]

    def _train(self, arm: str, seed: int, updates: int, precision: str) -> dict[str, Any]:
        given, cfg, load = self.given, self.configs[arm], [os.getloadavg()[0]]
        words = [*given.overrides, *peer.words_of(cfg, updates), *given.arms[arm], f"dalle_fit.precision={precision}", f"run.seed={seed}"]
        about = {"arm": arm, "seed": seed, "updates": updates, "producer": producer()}
        try:
            trained = self._launch(arm, seed, words)
        except SystemExit as left:
            if left.code != ExitCode.DIVERGED:
                raise
            return about | {"end": "diverged"}
        final, parameters = peer.judge(load_run(trained.url, []), trained, given.cores)
        drawn: dict[str, Any] = {}
        if given.drawings:
            drawn = {"drawings": sweep_drawings.measure(cfg, self.run, trained, given.drawings, given.cores)}
            if arm != self.found["base"]:
                base = RunFolder(self.run.at("against", self._name(self.found["base"], seed)))
                drawn["drawings"]["over_base"] = sweep_drawings.over(trained, base)
        return about | {
            "end": "done",
            "minutes": peer.training_seconds(trained) / 60,
            "epochs": updates * cfg.dalle_fit.batch / self.found["settings"]["training_images"],
            "parameters": parameters,
            "codes_per_picture": cfg.stream_shape().image_tokens,
            "train_nats_per_code": training_loss(trained.url),
            "nats_per_code_raw": final["raw"]["nats_per_code"],
            "load": [*load, os.getloadavg()[0]],
            **final["averaged"],
            **drawn,
        }

    def _launch(self, arm: str, seed: int, words: Sequence[str]) -> RunFolder:
        given, cfg = self.given, self.configs[arm]
        if given.drawings or given.own_codes(arm):
            return peer.launch_at(self._name(arm, seed), cfg, self.run, words, given.cores, own_codes=given.own_codes(arm))
        return peer.launch(cfg, self.run, "sweep", words, given.cores)

    def _name(self, arm: str, seed: int) -> str:
        """Name of the folder of a training that goes on where it was interrupted; that of another arm is another, whatever letters it has."""
        slug = re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")[:40]
        return f"{self.given.name}-{slug}-{hashlib.sha256(arm.encode()).hexdigest()[:6]}-seed-{seed}"

    def _write(self) -> None:
        peer.write(self.out, self.found)


class _Arm(stored.Stored):
    overrides: list[str]
    updates: Annotated[int, Field(ge=1, lt=1 << 53)] | None = None
    precision: Literal["bf16", "fp16", "fp32"] | None = None


class _Producer(stored.Stored):
    commit: str


class _Drawings(stored.Stored):
    """What sweep_drawings.measure and .over return."""

    captions: stored.Count
    psnr_db: stored.Number
    code_use: stored.Number
    code_perplexity: stored.Number
    retrieval: dict[str, dict[str, dict[str, Any]]]
    mmd2: dict[str, dict[str, Any]]
    over_base: dict[str, tuple[stored.Number, stored.Number]] = Field(default_factory=dict)


class _Run(stored.Stored):
    arm: str
    seed: int
    end: Literal["done", "diverged"]
    producer: _Producer
    updates: stored.Count
    codes_per_picture: stored.Count = 0
    minutes: stored.Number = 0.0
    epochs: stored.Number = 0.0
    train_nats_per_code: stored.Number = 0.0
    nats_per_code: stored.Number = 0.0
    caption_gain: stored.Number = 0.0
    drawings: _Drawings | None = None

    @model_validator(mode="after")
    def _has_its_figures(self) -> Self:
        lacking = [key for key in sweep_page.MEANS if key not in self.model_fields_set]
        if self.end == "done" and lacking:
            raise ValueError(f"a training that is done has no {', '.join(lacking)}")
        if self.nats_per_code < 0 or (self.end == "done" and not self.nats_per_code):
            raise ValueError("nats_per_code: a loss of codes is above 0")
        return self


class _Figures(stored.Stored):
    """A file of figures of this runner."""

    settings: dict[str, Any]
    arms: dict[str, _Arm]
    runs: list[_Run]


def _figures(path: Path) -> dict[str, Any]:
    """
    Raises:
        DataError: the file is damaged.
    """
    return stored.read(str(path), _Figures, "repair it, or remove it and make its trainings again")


def training_loss(url: str) -> float:
    """Mean training loss of the image codes over the last updates of a finished stage dalle."""
    points = read_metrics(url, "dalle")["train/loss_image"]
    tail = points[-max(1, round(_TAIL * len(points))) :]
    return sum(point.value for point in tail) / len(tail)


def main(words: Sequence[str]) -> int:
    """Go on with a sweep, and print its table."""
    parser = argparse.ArgumentParser(prog="python -m train.experiments.sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, help="the sweep, a TOML file")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder whose experiments/ gets the figures")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, and stop")
    given = parser.parse_args(words)
    try:
        file = read(given.file)
        sweep = Sweep(file, given.docs / "experiments" / f"sweep-{file.name}.json")
        if given.dry_run:
            print("\n".join(sweep.plan()))
            return 0
        sweep.go()
    except ReportedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(sweep_page.section(sweep.found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
