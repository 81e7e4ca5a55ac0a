"""What accelerators can do at best, by their vendor's datasheets, and what this processor does when tried."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from isthmus.errors import ConfigError, nearest

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
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str

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


def probe_cpu(products: tuple[tuple[int, int, int], ...], *, rounds: int = 3) -> Gpu:
    """This processor, by the best of a few matrix products of the plan's own sizes; takes about a second.

    Args:
        products: (rows, inner, columns) of each product; rows are cut so that one product stays short.
        rounds: repetitions, of which the fastest counts.
    """
    import torch

    rates = {dtype: _rate(products, dtype, rounds) for dtype in (torch.float32, torch.bfloat16)}
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    copied = _copy_rate()
    # Processes on one machine meet in its memory: both ways through it, and back.
    source = "measured here, on matrix products and a copy"
    return Gpu(CPU, rates[torch.bfloat16], rates[torch.float32], memory, copied, copied / 2, copied / 2, source)


def _rate(products: tuple[tuple[int, int, int], ...], dtype: object, rounds: int) -> float:
    """FLOP/s over all products together."""
    import torch

    operations = seconds = 0.0
    for rows, inner, columns in products:
        rows = max(1, min(rows, int(2e9 / (2 * inner * columns))))
        a, b = (torch.randn(shape, dtype=dtype) for shape in ((rows, inner), (inner, columns)))  # type: ignore[call-overload]
        repeats = max(1, int(2e8 / (2 * rows * inner * columns)))
        best = float("inf")
        for _ in range(rounds + 1):
            started = time.perf_counter()
            for _ in range(repeats):
                a @ b
            best = min(best, time.perf_counter() - started)
        operations += 2.0 * rows * inner * columns * repeats
        seconds += best
    return operations / seconds


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
