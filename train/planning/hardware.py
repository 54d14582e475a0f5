"""What GPUs can do by their datasheets: for shares of a peak, and for plans. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU inside its usual machine of eight. Rates are dense ones, without structured sparsity."""

    memory_gb: float
    tflops_16bit: float
    """fp16 or bf16 matrix products with fp32 accumulation."""
    memory_gb_s: float
    link_gb_s: float
    """To its neighbours in the machine, in one direction."""
    network_gb_s: float
    """Its share of the machine's network, in one direction."""
    watts: float
    source: str


GPUS = {
    "V100-16GB": Gpu(
        16, 125.0, 900, 150, 1.5625, 300, "NVIDIA V100 SXM2 datasheet; network: 100 Gbit/s for a machine of eight, assumed (the paper does not say)"
    ),
    "A100-80GB": Gpu(80, 312.0, 2039, 300, 25, 400, "NVIDIA A100 SXM4 80 GB datasheet; network: DGX A100, 200 Gbit/s for each GPU"),
    "H100-80GB": Gpu(80, 989.4, 3350, 450, 50, 700, "NVIDIA H100 SXM5 datasheet; network: DGX H100, 400 Gbit/s for each GPU"),
    "H200-141GB": Gpu(141, 989.4, 4800, 450, 50, 700, "NVIDIA H200 SXM datasheet; network: DGX H200, 400 Gbit/s for each GPU"),
    "B200-180GB": Gpu(180, 2250.0, 8000, 900, 50, 1000, "NVIDIA HGX B200 datasheet; network: DGX B200, 400 Gbit/s for each GPU"),
}
"""Datasheet figures by name."""


def find_by_device_name(name: str) -> Gpu | None:
    """The GPU whose datasheet belongs to a device as CUDA names it ('NVIDIA H100 80GB HBM3'); None if it is not in the table."""
    return next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in name and "PCIe" not in name), None)
