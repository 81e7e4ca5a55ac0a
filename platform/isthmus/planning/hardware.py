"""What accelerators can do at best, by their vendor's datasheets, and what this processor does when tried."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from isthmus.errors import ConfigError, nearest
from isthmus.planning.compute import Product

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: as ``--gpu`` takes it.
        bf16, fp32: dense matrix products, FLOP/s, without sparsity; fp32 without TF32, which torch leaves off.
        memory: bytes. Datasheets' gigabytes are taken as 10^9; drivers report a few per cent more on most.
        bandwidth: of that memory, bytes/s.
        link: to the other accelerators of the node, bytes/s in one direction.
        network: out of the node, bytes/s in one direction for each accelerator, of the usual eight-fold server.
        source: of these figures.
        elementwise: bytes/s, read and written, of work on elements into new memory; 0 where the share of the peak that
            a step reaches is to cover it.
        timed: seconds of the parts of a step that were timed whole, forward and backward; the others' products run at
            the rate.
        start: seconds that it takes to start a product and the operations about it; 0 as with ``elementwise``.
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str
    elementwise: float = 0.0
    timed: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products in ``bf16`` or ``fp32``."""
        return self.bf16 if precision == "bf16" else self.fp32


def _gpu(
    name: str, bf16: float, fp32: float, memory: float, bandwidth: float, link: float, network_gbit: float, source: str
) -> Gpu:
    """In the datasheets' units: TFLOP/s, GB, GB/s, and Gbit/s of network."""
    return Gpu(
        name, bf16 * TERA, fp32 * TERA, memory * GIGA, bandwidth * GIGA, link * GIGA, network_gbit / 8 * GIGA, source
    )


# Peak figures of the vendor's datasheet for each product; where it gives matrix products with sparsity, half of it.
# Links: NVLink's published figure counts both directions and is halved; PCIe 4.0 x16 is 32 GB/s each way.
# Networks: DGX A100, H100, H200 and B200 have one port for each GPU (200, then 400 Gbit/s); the cloud servers with
# eight L40S, A10G or L4 (g6e.48xlarge, g5.48xlarge, g6.48xlarge) share 400, 100 and 100 Gbit/s.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # HGX B200: 4.5 PFLOP/s sparse, 180 GB of HBM3e in DGX B200 (1,440 GB for eight), 8 TB/s, NVLink 5.
        _gpu("b200", 2250, 75, 180, 8000, 900, 400, "NVIDIA HGX/DGX B200 datasheet"),
        # 1,979 TFLOP/s sparse, HBM3e, NVLink 4.
        _gpu("h200", 989.4, 67, 141, 4800, 450, 400, "NVIDIA H200 (SXM) datasheet"),
        _gpu("h100", 989.4, 67, 80, 3350, 450, 400, "NVIDIA H100 (SXM) datasheet"),
        # 1,513 TFLOP/s sparse, HBM2e; a pair's NVLink bridge does not reach the other GPUs, PCIe 5.0 does.
        _gpu("h100-pcie", 756, 51, 80, 2000, 64, 400, "NVIDIA H100 (PCIe) datasheet"),
        _gpu("a100-80", 312, 19.5, 80, 2039, 300, 200, "NVIDIA A100 80GB (SXM) datasheet"),
        _gpu("a100-40", 312, 19.5, 40, 1555, 300, 200, "NVIDIA A100 40GB (SXM) datasheet"),
        _gpu("l40s", 362.05, 91.6, 48, 864, 32, 50, "NVIDIA L40S datasheet"),
        # AWS's own variant: 70 TFLOP/s where the A10 has 125.
        _gpu("a10g", 70, 35, 24, 600, 32, 12.5, "NVIDIA A10G datasheet"),
        # 242 TFLOP/s sparse.
        _gpu("l4", 121, 30.3, 24, 300, 32, 12.5, "NVIDIA L4 datasheet"),
    )
}
ALIASES = {
    "a100": "a100-80", "a100-80gb": "a100-80", "a100-40gb": "a100-40", "g5": "a10g", "g6": "l4", "g6e": "l40s",
    "p4d": "a100-40", "p4de": "a100-80", "p5": "h100", "p5e": "h200", "p6": "b200",
}  # fmt: skip
CPU = "cpu"


def find_gpu(name: str) -> Gpu:
    """The table's entry; cloud names of servers that hold one kind (g5, p4d, ...) are known too.

    Raises:
        ConfigError: no such entry; names the nearest one and all.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    key = ALIASES.get(key, key)
    if key in GPUS:
        return GPUS[key]
    known = [*GPUS, CPU]
    raise ConfigError(
        f"No accelerator called '{name}' is in the table.{nearest(key, [*known, *ALIASES])}",
        f"Known: {', '.join(known)}.",
    )


def probe_cpu(products: Mapping[Product, float], precision: str = "fp32", *, rounds: int = 3) -> Gpu:
    """This processor, timed at a plan's own matrix products; takes a few seconds.

    Args:
        products: how often each is made. Rows are cut so that one product stays short.
        precision: ``fp32`` or ``bf16``; the rate in the other is left at 0.
        rounds: repetitions of each, of which the median counts.
    """
    import torch

    rate = _rate(products, torch.bfloat16 if precision == "bf16" else torch.float32, rounds)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    copied = _copy_rate()
    return Gpu(
        CPU,
        rate if precision == "bf16" else 0.0,
        rate if precision == "fp32" else 0.0,
        memory,
        copied,
        copied / 2,  # processes on one machine meet in its memory: both ways through it, and back
        copied / 2,
        "measured here: the plan's own products, a copy, a sum into new memory, the start of operations",
        _elementwise_rate(),
        start=_start_seconds(),
    )


def _rate(products: Mapping[Product, float], dtype: torch.dtype, rounds: int) -> float:
    """FLOP/s over all products together, each as often as it is made."""
    operations = seconds = 0.0
    for product, count in products.items():
        short = replace(product, rows=max(1, min(product.rows, int(1e9 / (2 * product.inner * product.outer)))))
        operations += count * product.operations
        seconds += count * _product_seconds(short, dtype, rounds) * product.rows / short.rows
    return operations / seconds


def _product_seconds(product: Product, dtype: torch.dtype, rounds: int) -> float:
    """Median seconds of one product, on operands that the caches do not hold from the last time."""
    import torch

    n, i, o = product.rows, product.inner, product.outer
    size = dtype.itemsize * (n * i + n * o + i * o)
    copies = int(max(1, min(8, 2**26 / size)))
    weights = [torch.randn(o, i, dtype=dtype) for _ in range(copies)]
    inputs, outputs = ([torch.randn(n, width, dtype=dtype) for _ in range(copies)] for width in (i, o))
    calls: dict[str, Callable[[int], Tensor]] = {
        "forward": lambda k: torch.nn.functional.linear(inputs[k], weights[k]),
        "input": lambda k: outputs[k] @ weights[k],
        "weight": lambda k: outputs[k].t() @ inputs[k],
    }
    call = calls[product.kind]
    times = max(copies, int(1e8 / product.operations))
    call(0)
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for number in range(times):
            call(number % copies)
        found.append((time.perf_counter() - started) / times)
    return statistics.median(found)


def _elementwise_rate() -> float:
    """Bytes per second, read and written, of sums of activations' size into new memory."""
    import torch

    a, b = torch.zeros(2**21), torch.zeros(2**21)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(4):
            a + b
        seconds.append((time.perf_counter() - started) / 4)
    return 3 * a.numel() * a.element_size() / statistics.median(seconds)


def _start_seconds() -> float:
    """Seconds for a product of a network so small that nothing but starting its operations takes time: products,
    norms, activations and sums, forward and backward."""
    import torch
    from torch import nn

    depth, width = 12, 8
    layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
    found = []
    for _ in range(9):
        started = time.perf_counter()
        hidden = torch.zeros(4, width, requires_grad=True)
        for layer in layers:
            hidden = hidden + layer(hidden)
        hidden.sum().backward()
        found.append((time.perf_counter() - started) / (3 * depth))
    return statistics.median(found)


def _copy_rate() -> float:
    """Bytes per second read and written by a copy too large for the caches."""
    import torch

    source = torch.zeros(2**25)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / best
