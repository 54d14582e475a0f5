"""The benchmarks: name -> module. A new one is a module with ``run(options) -> Result`` and one line here."""

from importlib import import_module

from train.bench.harness import Result
from train.machine.rates import Options

BENCHES = {
    "checkpoint": "train.bench.checkpoint",
    "comm": "train.bench.comm",
    "compression": "train.bench.compression",
    "data-codes": "train.bench.data_codes",
    "data-images": "train.bench.data_images",
    "dvae": "train.bench.dvae",
    "floor": "train.bench.floor",
    "memory": "train.bench.memory",
    "model": "train.bench.model",
    "open-set": "train.bench.open_set",
    "optimizer": "train.bench.optimizer",
    "plan": "train.bench.plan",
    "sample": "train.bench.sample",
    "samples": "train.bench.samples",
    "training-peers": "train.bench.training_peers",
    "watching": "train.bench.watching",
}


def run(name: str, options: Options | None = None) -> Result:
    """Run a benchmark by name.

    Raises:
        ValueError: there is none of that name; the message lists the known ones.
    """
    if name not in BENCHES:
        raise ValueError(f"benchmark '{name}' is not known; accepted: {', '.join(sorted(BENCHES))}")
    result: Result = import_module(BENCHES[name]).run(options or Options())
    return result
