"""The training loop of all stages. What differs between stages is in their Task: the loss, the schedules, the evaluation."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infra import storage
from infra.errors import CheckpointError, StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.config import FitSection
from train.engines.protocol import Engine, MeasuringEngine, StatefulEngine, Update
from train.loop.diverged import diverged
from train.loop.goodput import Goodput, lost_s, process_age_s
from train.loop.metrics import MetricsWriter, next_attempt, throughput
from train.loop.plateau import Plateau
from train.loop.profiling import Profiler
from train.loop.task import Batch as Batch
from train.loop.task import Loader as Loader
from train.loop.task import Loss as Loss
from train.loop.task import Onlooker, sum_of_ids
from train.loop.task import Outcome as Outcome
from train.loop.task import Task as Task
from train.loop.watching import Watched
from train.ranks import watchdog
from train.ranks.device import wait_for_all
from train.ranks.leaving import Left, leave_if_stopped
from train.ranks.signal_vector import SignalVector
from train.run import change_points
from train.weights import checkpoint
from train.weights.checkpointer import Checkpointer
from train.weights.fragments import full_shape

log = logging.getLogger(__name__)

_PATIENCE = 6.0  # an evaluation or a save may take this many times the watchdog's limit for an update
RESTORE_PATIENCE = 20.0
"""Reading a checkpoint or an export may take this many times that limit (three hours), with all checkpoints that are tried before one is undamaged."""


@dataclass
class Trainer:
    """One training run of one stage."""

    stage: str
    task: Task
    engine: Engine
    loader: Loader
    section: FitSection
    run: RunFolder
    world: World
    stop: StopFlag
    device: torch.device
    meta: dict[str, Any] = field(default_factory=dict)
    """What is added to meta.json of every checkpoint: configuration and lineage."""
    flops_per_unit: float = 0.0
    """Floating-point operations of the forward and backward pass of one unit; 0: not counted."""
    peak_flops: float = 0.0
    """The most that one process could do of them in a second, for perf/mfu. Only the main rank needs it."""
    plateau: Plateau | None = None
    """If given, halves the scheduled learning rate at plateaus of the training loss."""
    onlooker: Onlooker | None = None
    """If given, draws pictures meanwhile."""

    def run_to_end(self) -> Outcome:
        """Train from the newest checkpoint to section.steps.

        Raises:
            StopRequested: a stop signal came; the state was saved.
            DivergedError: too many consecutive updates were bad (section.max_bad_steps, section.max_overflow_steps); the last checkpoint is kept.
        """
        try:
            return self._train()
        except StopRequested:
            self.stop.orderly("the end of training")
            raise
        finally:
            if self.onlooker is not None:
                self.onlooker.close()
            watchdog.rest()  # handling the error may take longer than an update

    def _train(self) -> Outcome:
        self._saver = Checkpointer(self.run.at(self.stage), self.world, self.section.keep, self.section.keep_every)
        self._bad = self._overflows = 0
        self._stall_s = self._units = self._update_s = 0.0
        self._counts = {"forward_non_finite": 0, "gradient_overflow": 0}
        self._changes, self._evaluation_owed = list[dict[str, Any]](), False
        self.stop.phase("the restoring of a checkpoint")
        with watchdog.expecting(RESTORE_PATIENCE):  # afterwards no limit until the first update is done: it may have much to compile
            step = self._restore()
        self._write_from(step)
        self._vector = SignalVector((*self.task.metrics, "samples"), self.device, self.world)
        begun = time.perf_counter()
        evaluation, owed = dict[str, float](), False
        self._watched = Watched(self.stage, self.section, self.world, self.device, step)
        profiler = Profiler(self.run, self.stage, self.section, self.world, self.device, step)
        self.stop.phase("the first update, which compiles", patient=True, insisting=True)
        if self._evaluation_owed and step < self.section.steps:
            self._evaluate_again(step)
        while step < self.section.steps:
            started = time.perf_counter()
            with profiler.update(step + 1):
                agreed, logged = self._update(step, started)
            seconds = time.perf_counter() - started
            self._has_begun(started)
            watchdog.beat(_PATIENCE)
            step += 1
            last = step == self.section.steps
            logged |= self._watched.updated(step, seconds, logged["train/loss"], sum(self._counts.values()), self._vector.own_s)
            if step % self.section.log_every == 0 or last:
                self._writer.scalars(step, logged)
            stopping = agreed["stop"] > 0
            self._evaluation_owed = stopping and not last and step % self.section.eval_every == 0  # the next start makes it
            try:
                if last or (step % self.section.eval_every == 0 and not stopping):
                    evaluation = self._evaluate(step)
            except Left:  # the next start makes it, with the weights that are saved now
                stopping = self._evaluation_owed = True
            owed |= step % self.section.save_every == 0
            # A bad streak must not push out the last good checkpoint: the save waits for the first good update.
            if (owed and not self._bad and not self._overflows) or last or stopping:
                owed = False
                self._watched.phases.resume()
                self._save_now(step, self._elapsed + time.perf_counter() - begun, waits=last or stopping)
                self._watched.phases.ended("save")
            if self.onlooker is not None and not stopping:
                with self._goodput.timing("evaluate"):
                    self.onlooker.look(self._saver.saved, at_evaluation=step % self.section.eval_every == 0)
            profiler.ended(step, self._watched.phases)
            watchdog.beat()
            if stopping and (self._evaluation_owed or not last):
                self._account(step)
                wait_for_all()  # no launcher may see a rank end while another still writes
                raise StopRequested(f"{self.stage}: stopped by a signal after update {step} of {self.section.steps}; saved.")
        self._watched.finish()
        self.stop.phase("the end, after the last checkpoint")
        if not evaluation:  # killed between the last checkpoint and the stage's marker
            evaluation = self._evaluate_again(step)
        self._account(step)
        return Outcome(evaluation, self._elapsed + time.perf_counter() - begun, throughput(self._units, self._update_s), step)

    def _write_from(self, step: int) -> None:
        """Begin the metrics of this attempt."""
        lost = lost_s(self.run.url, self.stage, step) if self.world.is_main else 0.0
        self._goodput = Goodput(lost, process_age_s())
        attempt = next_attempt(self.run.url, self.stage) if self.world.is_main else 0
        self._writer = MetricsWriter(self.run.url, self.stage, attempt, enabled=self.world.is_main)
        points = [point for point in self._changes if point["step"] == step]
        if attempt == 0 or points:  # TensorBoard would show the same text once for each attempt
            self._writer.describe(min(step + 1, self.section.steps), self.meta.get("config", {}), self.meta.get("parents", {}))
        for point in points:
            self._writer.text(step, "change point", change_points.described(point))

    def _has_begun(self, started: float) -> None:
        """From the first update on there is something to save: a stop signal now takes effect at the end of an update."""
        if self.stop.name:
            self.stop.orderly("an update")
            if self.world.is_main:
                log.info("%s: the first update took %.1f s, compilation included", self.stage, time.perf_counter() - started)

    def _save_now(self, step: int, elapsed_s: float, *, waits: bool) -> None:
        with self._goodput.timing("save"), self.stop.during("a save"):
            self._save(step, elapsed_s)
            if not waits:
                return
            self._settle(step)
            self._saver.wait()
        self._writer.scalars(step, {"perf/save_s": self._saver.seconds})
        if self.world.is_main and self.stop:
            log.info("%s: the checkpoint after update %d took %.1f s", self.stage, step, self._saver.seconds)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Evaluate, or raise Left where a rank was asked to stop meanwhile."""
        with self._goodput.timing("evaluate"), self.stop.during("an evaluation"):
            found = self.task.evaluate(self.engine, step, self._writer, partial(leave_if_stopped, self.stop))
        self._writer.scalars(step, {f"eval/{name}": value for name, value in found.items()})
        return found

    def _evaluate_again(self, step: int) -> dict[str, float]:
        """What an earlier start did not come to: nothing is lost with it."""
        try:
            return self._evaluate(step)
        except Left:
            raise StopRequested(f"{self.stage}: stopped by a signal during the evaluation of update {step}; nothing was lost.") from None

    def _account(self, step: int) -> None:
        """Print and log what the attempt spent its time on, and close the metrics."""
        watchdog.rest()
        if self.world.is_main:
            self._writer.scalars(step, self._goodput.metrics())
            print(self._goodput.line(self.stage), flush=True)
        self._writer.close()

    def _update(self, step: int, started: float) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer update: fetch the batches, forward and backward passes, reduce the signals over all ranks, step."""
        at = self.task.schedule(step)
        if self.plateau is not None:
            at["lr"] *= self.plateau.factor
        phases = self._watched.phases
        own_s = phases.own_s()  # of the update before: on a GPU, this one's is not known yet
        phases.begin(started)
        batches = [self.loader.next() for _ in range(self.section.accumulation)]
        waited = phases.ended("data")
        denominators = self.task.denominators(batches)
        phases.ended("reduce")  # where padding does not count, ranks have waited for each other
        shares: dict[str, Tensor] = {}
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for index, batch in enumerate(batches):
            self.engine.micro_batch(last=index == len(batches) - 1)
            phases.forward()
            loss = self.task.loss(self.engine, batch, step, at, denominators)
            phases.forward_ended()
            self.engine.backward(loss.total)
            finite &= torch.isfinite(loss.total.detach())
            for name, value in loss.sums.items():
                shares[name] = shares.get(name, 0.0) + value.detach()
            phases.ended("backward")
        elapsed = time.perf_counter() - started
        signals = {
            "stop": float(bool(self.stop)),
            "non_finite": (~finite).double(),
            "step_time_s": elapsed,
            "samples": sum_of_ids(batches),
            **shares,
        }
        if isinstance(self.engine, MeasuringEngine):
            agreed, measured = self._vector.exchange_with(signals, self.engine.measure(), own_s)
            phases.ended("reduce")
            settled = self._settle(step)
            phases.ended("save")
            update = self.engine.step(at["lr"], measured)
        else:
            agreed, _ = self._vector.exchange_with(signals, None, own_s)
            phases.ended("reduce")
            settled = self._settle(step)
            phases.ended("save")
            update = self.engine.step(at["lr"])
        phases.ended("step")
        self._count_bad(step, update, forward_ok=agreed["non_finite"] == 0)
        if self.plateau is not None:
            self.plateau.observe(step + 1, agreed["loss"])
        seconds = time.perf_counter() - started
        self._goodput.add("data", waited)
        self._goodput.add("save", settled)
        self._goodput.add("step", seconds - waited - settled)
        units = sum(self.task.units(batch) for batch in batches) * self.world.size
        self._units, self._update_s = self._units + units, self._update_s + seconds
        self._writer.measured(step + 1, update)
        speed = {f"perf/{self.task.unit}_per_s": units / seconds, "data/wait_s": waited}
        if self.peak_flops:
            speed["perf/mfu"] = self.flops_per_unit * units / seconds / (self.peak_flops * self.world.size)
        return agreed, self._logged(at, agreed, update) | speed

    def _logged(self, at: dict[str, float], agreed: dict[str, float], update: Update) -> dict[str, float]:
        """What is logged of an update, less its speed."""
        logged = {f"train/{name}": agreed[name] for name in self.task.metrics}
        logged |= {f"optim/{name}" if name == "lr" else f"sched/{name}": value for name, value in at.items()}
        logged |= {"optim/grad_norm": update.grad_norm, "data/samples": agreed["samples"]}
        if self.plateau is not None:
            logged["sched/halvings"] = len(self.plateau.halved)
        if self.engine.loss_scale is not None:
            logged |= {"optim/loss_scale": self.engine.loss_scale.value, "optim/skipped_updates": self.engine.loss_scale.skipped}
        return logged | {f"numerics/{name}": float(count) for name, count in self._counts.items() if count}

    def _count_bad(self, step: int, update: Update, *, forward_ok: bool) -> None:
        """Count the bad updates since the last good one, by kind, and give up after too many.

        Overflows of scaled gradients have a limit of their own, a larger one: after each the scale is reduced, which takes some updates. They count even
        if only one resblock skipped the update.

        Raises:
            DivergedError: there were too many.
        """
        self._counts["forward_non_finite"] += not forward_ok
        self._counts["gradient_overflow"] += forward_ok and (update.overflow or not update.applied)
        if forward_ok and update.applied and not update.overflow:
            self._bad = self._overflows = 0
            return
        if forward_ok and update.overflow:
            self._overflows += 1
        else:
            self._bad += 1
        if self._bad < self.section.max_bad_steps and self._overflows < self.section.max_overflow_steps:
            return
        self._saver.wait()
        self._writer.close()
        raise diverged(self.stage, self.section, self.run.url, step, self._saver.saved or self._resumed, self._bad, self._overflows)

    def _restore(self) -> int:
        engine = self.engine if isinstance(self.engine, StatefulEngine) else None
        more = None if engine is None else lambda meta: engine.more_to_load(meta.get("engine", {}))
        meta = checkpoint.load_newest(self.run.at(self.stage), self.engine.fragments(to_load=True), self.world, more)
        self._elapsed, self._resumed = 0.0, 0
        if meta is None:
            return 0
        checkpoint.check_resumable(meta, self.run.at(self.stage))
        shapes = self._shapes()
        if meta["shapes"] != shapes:
            odd = sorted(name for name in shapes.keys() | meta["shapes"].keys() if shapes.get(name) != meta["shapes"].get(name))
            raise CheckpointError(f"{self.run.at(self.stage)}: the checkpoint is of another model; first difference: {odd[0]}.")
        self._adopt(meta.get("parents", {}))
        self.engine.loaded(meta["updates"])
        if self.engine.loss_scale is not None and meta.get("loss_scale"):
            self.engine.loss_scale.restore(meta["loss_scale"])
        if engine is not None and "engine" in meta:
            engine.restore(meta["engine"])
        if self.plateau is not None and meta.get("plateau"):
            self.plateau.restore(meta["plateau"], int(meta["step"]))
        self._counts |= meta.get("bad_updates", {})
        self._go_on(meta)
        self.loader.restore(meta["loader"])
        self._elapsed = meta["elapsed_s"]
        self._evaluation_owed = bool(meta.get("evaluation_owed"))
        self._resumed = int(meta["step"])
        log.info("%s: resumed after update %d", self.stage, self._resumed)
        return self._resumed

    def _go_on(self, meta: dict[str, Any]) -> None:
        """If the configuration differs from the checkpoint's, start a change point here; apply the change points that the run already has."""
        if "config" not in meta or "config" not in self.meta:
            return
        earlier = len(meta.get("changes", []))
        self._changes = change_points.continued(meta, self.meta["config"], self.stage, self.section.on_change)
        file = self.run.at(self.stage, change_points.FILE)
        if self.world.is_main and (self._changes or storage.exists(file)):
            storage.write_json(file, self._changes)
        if not self._changes:
            return
        self.task.curve = change_points.curve(self._changes, self.section.steps)
        if self.plateau is not None:
            restarts = len(self._changes) > earlier and self._changes[-1]["schedule"] == "restarted"
            (self.plateau.restart if restarts else self.plateau.begin_at)(self.task.curve.start)
        for point in self._changes[earlier:] if self.world.is_main else ():
            log.warning("%s: goes on %s", self.stage, change_points.described(point))

    def _adopt(self, parents: dict[str, str]) -> None:
        """Take over the lineage of a checkpoint. The inputs must be the ones that it was trained on; only the weights that it was initialised from may be gone.

        Raises:
            CheckpointError: it was trained on other inputs.
        """
        mine = self.meta.setdefault("parents", {})
        odd = sorted(kind for kind in (mine.keys() | parents.keys()) - {"init_from"} if mine.get(kind) != parents.get(kind))
        if odd:
            lines = [f"  {kind}: {parents.get(kind, 'none')} -> {mine.get(kind, 'none')}" for kind in odd]
            raise CheckpointError(
                f"{self.run.at(self.stage)}: the checkpoint was made from other inputs than are there now; bring those back, or train in another run "
                "(run.name):\n" + "\n".join(lines) + "\n  (checkpoint -> now)"
            )
        if "init_from" in parents:
            mine["init_from"] = parents["init_from"]

    def _save(self, step: int, elapsed_s: float) -> None:
        facts = {"elapsed_s": elapsed_s, "shapes": self._shapes(), "updates": self.engine.updates, "loader": self.loader.state(), **self.meta}
        facts["bad_updates"] = self._counts
        if self._evaluation_owed:
            facts["evaluation_owed"] = True
        if self._changes:
            facts["changes"] = self._changes
        if self.engine.loss_scale is not None:
            facts["loss_scale"] = self.engine.loss_scale.state()
        if isinstance(self.engine, StatefulEngine):
            facts["engine"] = self.engine.state()
        if self.plateau is not None:
            facts["plateau"] = self.plateau.state()
        began = time.perf_counter()
        self._saver.save(step, self.engine.fragments(to_load=False), facts, ready=self.engine.average.wait)
        self._stall_s = time.perf_counter() - began
        if self._saver.seconds:  # the time of the previous save, which has ended by now
            self._writer.scalars(step, {"perf/save_s": self._saver.seconds})
        self._writer.flush()

    def _settle(self, step: int) -> float:
        """Wait until the tensors of a save have been copied, because the step that follows changes them; return the seconds waited."""
        settled = self._saver.settle()
        stall_s, self._stall_s = self._stall_s + settled, 0.0
        if stall_s:
            self._writer.scalars(step, {"perf/save_stall_s": stall_s})
        return settled

    def _shapes(self) -> dict[str, list[int]]:
        return {name: full_shape(parameter) for name, parameter in self.engine.module.named_parameters()}
