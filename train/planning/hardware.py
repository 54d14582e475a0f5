"""Figures of GPUs from their datasheets, for the MFU and for estimates. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual machine with eight of them. Rates are those of dense products, without structured sparsity."""

    memory_gb: float
    tflops_16bit: float
    """Rate of fp16 or bf16 matrix products with fp32 accumulation."""
    memory_gb_s: float
    link_gb_s: float
    """Rate of its link to the other GPUs of the machine, in one direction."""
    network_gb_s: float
    """Its share of the machine's network, in one direction."""
    watts: float
    source: str
    tflops_fp32: float = 0.0
    """Rate of fp32 matrix products without TF32, which nothing here turns on; 0: unknown, and a sixteenth of the 16-bit rate is assumed."""
    passes_gb_s: float = 0.0
    """Bytes that operations other than products read and write in the activations; 0: ``memory_gb_s``, for which they wait on a GPU. A CPU is slower at exponentials, and
    faster where its caches hold the operands."""
    message_us: float = 0.0
    """Latency of a message to all ranks; no datasheet has it, and 0 leaves it out."""
    computes_while_sending: bool = True
    """A GPU does; a CPU's cores send as well."""

    @property
    def fp32_rate(self) -> float:
        """TFLOP/s of fp32 products."""
        return self.tflops_fp32 or self.tflops_16bit / 16

    @property
    def pass_rate(self) -> float:
        """GB/s of operations in the activations."""
        return self.passes_gb_s or self.memory_gb_s


_ASSUMED = "100 Gbit/s for a machine of eight, assumed"
GPUS = {
    "V100-16GB": Gpu(
        16,
        125.0,
        900,
        150,
        1.5625,
        300,
        "NVIDIA V100 SXM2 datasheet; network: 100 Gbit/s for a machine of eight, assumed (the paper does not say)",
        tflops_fp32=15.7,
    ),
    "A100-80GB": Gpu(80, 312.0, 2039, 300, 25, 400, "NVIDIA A100 SXM4 80 GB datasheet; network: DGX A100, 200 Gbit/s for each GPU", tflops_fp32=19.5),
    "H100-80GB": Gpu(80, 989.4, 3350, 450, 50, 700, "NVIDIA H100 SXM5 datasheet; network: DGX H100, 400 Gbit/s for each GPU", tflops_fp32=66.9),
    "H200-141GB": Gpu(141, 989.4, 4800, 450, 50, 700, "NVIDIA H200 SXM datasheet; network: DGX H200, 400 Gbit/s for each GPU", tflops_fp32=66.9),
    "B200-180GB": Gpu(180, 2250.0, 8000, 900, 50, 1000, "NVIDIA HGX B200 datasheet; network: DGX B200, 400 Gbit/s for each GPU", tflops_fp32=75),
    "A100-40GB": Gpu(40, 312.0, 1555, 300, 25, 400, "NVIDIA A100 SXM4 40 GB datasheet; network: DGX A100, 200 Gbit/s for each GPU", tflops_fp32=19.5),
    "A10-24GB": Gpu(24, 125.0, 600, 32, 1.5625, 150, f"NVIDIA A10 datasheet; PCIe 4.0 x16; network: {_ASSUMED}", tflops_fp32=31.2),
    "L4-24GB": Gpu(24, 121.0, 300, 32, 1.5625, 72, f"NVIDIA L4 datasheet; PCIe 4.0 x16; network: {_ASSUMED}", tflops_fp32=30.3),
    "L40S-48GB": Gpu(48, 362.0, 864, 32, 1.5625, 350, f"NVIDIA L40S datasheet; PCIe 4.0 x16; network: {_ASSUMED}", tflops_fp32=91.6),
    "RTX4090-24GB": Gpu(
        24, 165.2, 1008, 32, 1.5625, 450, f"NVIDIA Ada whitepaper (fp16 with fp32 accumulation); PCIe 4.0 x16; network: {_ASSUMED}", tflops_fp32=82.6
    ),
    "RTX5090-32GB": Gpu(
        32,
        209.5,
        1792,
        64,
        1.5625,
        575,
        f"NVIDIA RTX Blackwell whitepaper (fp16 with fp32 accumulation); PCIe 5.0 x16; network: {_ASSUMED}",
        tflops_fp32=104.8,
    ),
    "B300-288GB": Gpu(
        288,
        2250.0,
        8000,
        900,
        100,
        1400,
        "NVIDIA HGX B300 datasheet; network: DGX B300, 800 Gbit/s for each GPU; power: the upper limit",
        tflops_fp32=75,
    ),
}
"""Datasheet figures by name."""
_NUMBERS = ("memory_gb", "tflops_16bit", "memory_gb_s", "link_gb_s", "network_gb_s", "watts", "tflops_fp32", "passes_gb_s", "message_us")
_DEFAULTS = {"link_gb_s": 32.0, "network_gb_s": 1.5625, "watts": 400.0, "tflops_fp32": 0.0, "passes_gb_s": 0.0, "message_us": 0.0}
"""Values for numbers that are not given: PCIe 4.0, 100 Gbit/s for a machine of eight GPUs, and a typical power; for the others see ``Gpu``."""


def parse_gpu(text: str) -> Gpu:
    """Parse a GPU that is given by its numbers: 'memory_gb=48,tflops_16bit=362,memory_gb_s=864'.

    Raises:
        ValueError: a name is unknown, a value is not a positive number, or a number is missing.
    """
    given: dict[str, Any] = {}
    for word in text.split(","):
        key, _, value = word.partition("=")
        try:
            given[key.strip()] = float(value)
        except ValueError:
            given[key.strip()] = 0.0
    wrong = [key for key, value in given.items() if key not in _NUMBERS or not 0 < value < float("inf")]
    missing = [key for key in _NUMBERS if key not in given and key not in _DEFAULTS]
    if wrong or missing:
        raise ValueError(f"numbers above 0 such as memory_gb=48,tflops_16bit=362,memory_gb_s=864; also {', '.join(_DEFAULTS)}.")
    return Gpu(**(_DEFAULTS | given), source="given by --gpu")


def named(text: str) -> tuple[str, Gpu]:
    """Find a GPU by its name, by the beginning of its name if that is unique ('L4', 'H100', 'rtx4090'), or by its numbers. Returns its name and its figures.

    Raises:
        ValueError: no GPU or several match, or a number is wrong.
    """
    if "=" in text:
        try:
            return text, parse_gpu(text)
        except ValueError as error:
            raise ValueError(f"accepted are {', '.join(GPUS)}, or {error}") from error
    plain = text.upper().replace(" ", "")
    begun = [name for name in GPUS if name.upper().startswith(plain)] if plain else []
    found = [name for name in begun if plain in (name.upper(), name.upper().partition("-")[0])] or begun
    if len(found) == 1:
        return found[0], GPUS[found[0]]
    meant = f"several begin so: {', '.join(found)}" if found else f"accepted are {', '.join(GPUS)} and beginnings of them"
    raise ValueError(f"{meant}; or numbers above 0 such as memory_gb=48,tflops_16bit=362,memory_gb_s=864.")


def find_by_device_name(name: str) -> Gpu | None:
    """The figures of a GPU by the name that CUDA reports ('NVIDIA H100 80GB HBM3'); None if it is not in the table."""
    if "PCIe" in name:
        return None
    found = [key for key in GPUS if re.search(rf"\b{key.split('-')[0]}\b", name.replace("RTX ", "RTX"))]
    exact = [key for key in found if re.search(rf"\b{key.split('-')[1]}\b", name)]
    return GPUS[(exact or found)[0]] if found else None
