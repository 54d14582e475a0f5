"""What the matrix units and the memory of a machine can do; other benchmarks are compared with it. ``python -m train.bench.floor``"""

import os

from train.bench.harness import Result, main, start
from train.machine.rates import DTYPES, Options, copy_rate, matmul_rate, threads

# Most CPUs have no fp16 products and emulate them a hundred times slower: a full-size call would take seconds.
_SLOW = (256, 256, 256)


def run(options: Options) -> Result:
    """Measure matrix rates for each dtype, and the bandwidth of a copy; on a CPU with one thread and with all cores."""
    large = options.device == "cuda"
    result = start("floor", "Floors: matrix products and copies", options, matmul="8192^3" if large else "1024^3, fp16 256^3")
    counts = [1] if large else sorted({1, os.cpu_count() or 1})
    for count in counts:
        after = "" if large else f", {count} thread{'s' if count > 1 else ''}"
        with threads(count):
            for name, dtype in DTYPES.items():
                result.measured[f"matmul {name}{after}"] = matmul_rate(dtype, options, None if large or name != "fp16" else _SLOW)
            result.measured[f"copy{after}"] = copy_rate(options)
        result.ratio(f"bf16 over fp32{after}", f"matmul bf16{after}", f"matmul fp32{after}")
    return result


if __name__ == "__main__":
    main(run)
