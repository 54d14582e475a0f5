"""Section: what the run took, in hours of its processes; with a price or a power (section [report]) also in money and energy."""

from __future__ import annotations

from train.planning.estimate import POWER_OVERHEAD
from train.planning.hardware import named
from train.report.markup import Child, el, join, note, table
from train.report.view import RunView, Section
from train.run.stage_table import STAGES


def section(run: RunView) -> Section | None:
    """A row for each finished stage. What attempts lost is in no stage's time, and is added where the metrics know it."""
    hours = {stage: _hours(run, stage) for stage in STAGES if run.done(stage).get("seconds")}
    if not hours:
        return Section("cost", "Cost and energy", note("No stage has finished yet."))
    asked = run.section("report")
    price, watts, source = float(asked.get("price") or 0), float(asked.get("watts") or 0), "report.watts"
    if asked.get("gpu") and not watts:
        name, figures = named(str(asked["gpu"]))
        watts, source = figures.watts, f"{name}: {figures.source}"
    unit, factor = ("hours", 1) if sum(hours.values()) >= 1 else ("minutes", 60)
    rows: list[list[Child]] = [[stage, *_row(found, factor, price, watts)] for stage, found in hours.items()]
    rows.append([el("b", "together"), *(el("b", cell) for cell in _row(sum(hours.values()), factor, price, watts))])
    header = ["stage", f"{unit} x processes", *(["cost"] if price else []), *(["kWh at the wall"] if watts else [])]
    words = [
        f"Estimated from each stage's own time, over all attempts, times its processes; at {price:g} for a process and hour." if price else None,
        f" Energy: {watts:g} W a process ({source}), times {POWER_OVERHEAD:g} for processors, network and cooling." if watts else None,
        None if price else " 'launcher.py report RUN report.price=2.5' adds a cost",
        None if price or not watts else ".",
        None if watts else f"{',' if price else ' and'} report.gpu=H100 (a name of 'launcher.py plan') or report.watts=65 an energy.",
    ]
    lost = sum(_lost_hours(run, stage) for stage in hours)
    aside = note(f"Lost when attempts ended before a save, and not in the table: {lost:.2f} hours x processes.") if lost else None
    return Section("cost", "Cost and energy", join(table(header, rows, numbers=range(1, len(header))), note(*words), aside))


def _hours(run: RunView, stage: str) -> float:
    done = run.done(stage)
    return float(done["seconds"]) / 3600 * int(done.get("world_size") or 1)


def _lost_hours(run: RunView, stage: str) -> float:
    """Each attempt that began behind work which was lost logs that once, when it ends."""
    lost = sum(max(0.0, point.value) for point in run.series(stage).get("goodput/lost_s", []))
    return lost / 3600 * int(run.done(stage).get("world_size") or 1)


def _row(hours: float, factor: int, price: float, watts: float) -> list[str]:
    cost = [f"{hours * price:,.2f}"] if price else []
    energy = [f"{hours * watts * POWER_OVERHEAD / 1000:,.3g}"] if watts else []
    return [f"{hours:,.3g}" if factor == 1 else f"{hours * factor:,.2f}", *cost, *energy]
