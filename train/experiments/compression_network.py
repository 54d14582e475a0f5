"""Measures the time of updates with exact sums and with compression, between two machines with two processes each, at several bandwidths:
``python -m train.experiments.compression_network``.

The machines are network namespaces on this machine, connected by a virtual cable whose rate a token bucket limits (needs root, ``ip`` and ``tc``). With each
configuration the real engine makes some updates at each rate, and the counter of the cable tells how many bytes were sent. The figures are written to
compression-network.json in docs/experiments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra.files import atomic
from infra.repository import DOCS
from infra.run_folder import producer
from infra.world import World
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer
from train.config import DalleFit, ZeroSection
from train.config_compression import CompressionSection

SHAPE = StreamShape(text_tokens=16, text_vocab=64, grid=4, image_vocab=64)
CONFIG = TransformerConfig(layers=2, width=256, heads=8, conv_kernel=3)
RATES = (20, 50, 100, 200, 500, 1000, 2000, 4000, 0)
"""Mbit/s; 0: no limit."""
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "r/d 0.25, 1-6-9": {"method": "powersgd", "rank": 64, "wire": "1-6-9"},
    "r/d 0.25, fp32": {"method": "powersgd", "rank": 64, "wire": "fp32"},
}
_CABLE = "cable"
_ADDRESSES = ("10.213.0.1", "10.213.0.2")
_WARM, _UPDATES, _PROCESSES = 1, 9, 2


def main(words: Sequence[str]) -> None:
    """Set up the cable, start the processes, and write the figures that rank 0 measured."""
    parser = argparse.ArgumentParser(prog="python -m train.experiments.compression_network", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS / "experiments" / "compression-network.json")
    parser.add_argument("--rates", type=int, nargs="+", default=list(RATES), help="Mbit/s; 0: unbounded")
    given = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are removed
    spaces = [f"machine-{os.getpid()}-{node}" for node in range(2)]
    try:
        _lay(spaces)
        with tempfile.TemporaryDirectory() as folder:
            _start(spaces, folder, given.rates)
            rows = json.loads(Path(folder, "rows.json").read_text())
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)
    settings = {
        "layers": CONFIG.layers,
        "width": CONFIG.width,
        "stage": 3,
        "precision": "fp32",
        "machines": 2,
        "processes": _PROCESSES,
        "updates": _UPDATES,
    }
    found = {"kind": "compression-network", "settings": settings, "rows": rows, "producer": producer()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(given.out) as file:
        file.write(json.dumps(found, indent=1, sort_keys=True).encode() + b"\n")
    print(json.dumps(rows, indent=1))


def _lay(spaces: Sequence[str]) -> None:
    for space in spaces:
        subprocess.run(["ip", "netns", "add", space], check=True)
        subprocess.run(["ip", "-n", space, "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "link", "add", _CABLE, "netns", spaces[0], "type", "veth", "peer", "name", _CABLE, "netns", spaces[1]], check=True)
    for space, address in zip(spaces, _ADDRESSES, strict=True):
        subprocess.run(["ip", "-n", space, "addr", "add", f"{address}/24", "dev", _CABLE], check=True)
        subprocess.run(["ip", "-n", space, "link", "set", _CABLE, "up"], check=True)


def _start(spaces: Sequence[str], folder: str, rates: Sequence[int]) -> None:
    """Raises: SystemExit: a process failed."""
    started = []
    for rank in range(2 * _PROCESSES):
        node, local = divmod(rank, _PROCESSES)
        numbers = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": 2 * _PROCESSES, "LOCAL_WORLD_SIZE": _PROCESSES}
        environment = os.environ | {name: str(number) for name, number in numbers.items()} | {"GLOO_SOCKET_IFNAME": _CABLE, "OMP_NUM_THREADS": "1"}
        code = f"from train.experiments.compression_network import worker; worker({folder!r}, {list(rates)!r})"
        started.append(subprocess.Popen(["ip", "netns", "exec", spaces[node], sys.executable, "-c", code], env=environment))
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise SystemExit(f"processes ended with {codes}")


def worker(folder: str, rates: Sequence[int]) -> None:
    """Run one process: measures every configuration at every rate."""
    torch.set_num_threads(1)
    world = World.from_env()
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder, "store")), world.size), rank=world.rank, world_size=world.size)
    rows = []
    for name, way in WAYS.items():
        engine = _engine(world, CompressionSection(**way))
        for rate in rates:
            _bound(world, rate)
            rows.append({"way": name, "mbit_s": rate} | _measure(engine))
    if world.is_main:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _engine(world: World, section: CompressionSection) -> Any:
    from train.engines.zero.construction import sharded_construction
    from train.engines.zero.engine import ZeroEngine

    fit, zero = DalleFit(batch=2 * world.size, precision="fp32", numerics_every=1 << 30, ema_every=1 << 30), ZeroSection(stage=3, sharding="node")
    torch.manual_seed(0)
    with sharded_construction(fit, zero, world):
        model = Transformer(CONFIG, SHAPE)
    return ZeroEngine(model, fit, zero, world, None, section)


def _bound(world: World, rate: int) -> None:
    """Limit the rate at which a machine sends. Done by its first process, after all processes have finished sending."""
    dist.barrier()
    if world.local_rank == 0:
        subprocess.run(["tc", "qdisc", "del", "dev", _CABLE, "root"], check=False, capture_output=True)
        if rate:
            words = ["tc", "qdisc", "add", "dev", _CABLE, "root", "tbf", "rate", f"{rate}mbit", "burst", "64kb", "latency", "400ms"]
            subprocess.run(words, check=True)
    dist.barrier()


def _measure(engine: Any) -> dict[str, Any]:
    """Medians over updates: seconds of the forward and backward passes, of the exchange between machines, and of the whole update; bytes that a machine sends over the
    cable; and the bytes that compression counts."""
    parts: list[tuple[float, float, float]] = []
    text, lengths, codes = torch.randint(64, (2, 16)), torch.tensor([16, 9]), torch.randint(64, (2, 16))
    begin = 0
    for update in range(_WARM + _UPDATES):
        if update == _WARM:
            dist.barrier()
            begin = _sent()
        started = time.perf_counter()
        engine.micro_batch(last=True)
        text_nll, image_nll = engine(text, lengths, codes)
        engine.backward((text_nll.mean() + image_nll.mean()) / engine.world.size)
        passed = time.perf_counter()
        vector = engine.measure()
        exchanged = time.perf_counter()
        dist.all_reduce(vector)
        engine.step(1e-4, vector.tolist())
        parts.append((passed - started, exchanged - passed, time.perf_counter() - started))
    dist.barrier()
    passes, exchange, whole = (statistics.median(column) for column in zip(*parts[_WARM:], strict=True))
    counted = engine.compression.wire.sent * _PROCESSES if engine.compression is not None else None
    return {
        "passes_s": round(passes, 4),
        "exchange_s": round(exchange, 4),
        "update_s": round(whole, 4),
        "cable_bytes": (_sent() - begin) // _UPDATES,
        "counted_bytes": counted,
    }


def _sent() -> int:
    """How many bytes this machine has sent over the cable, headers and acknowledgements included."""
    found = subprocess.run(["ip", "-s", "-j", "link", "show", _CABLE], check=True, capture_output=True, text=True)
    return int(json.loads(found.stdout)[0]["stats64"]["tx"]["bytes"])


if __name__ == "__main__":
    main(sys.argv[1:])
