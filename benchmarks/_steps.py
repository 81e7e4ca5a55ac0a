"""What the two step benchmarks share: alternating timing, peak memory, floating-point operations, tables."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DENSE_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
"""Vendors' peak rates without sparsity, to read model-FLOPs utilisation against."""


def device() -> torch.device:
    """The accelerator where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bf16() -> bool:
    """Whether this machine multiplies in bfloat16 rather than emulating it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call, the accelerator's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def alternate(contenders: Mapping[str, Callable[[], object]], repeats: int, *, warm: bool = True) -> dict[str, float]:
    """Median seconds of each, measured in turns so that a slow minute hits all of them; ``warm`` adds a first round
    that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + warm):
        for name, work in contenders.items():
            took = timed(work)
            if number >= warm:
                seconds[name].append(took)
    return {name: statistics.median(found) for name, found in seconds.items()}


def flops(work: Callable[[], object]) -> float:
    """Floating-point operations (two for each multiply-add) of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return float(counter.get_total_flops())


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of the model's own sizes: the best that a step can hope for."""
    a = torch.randn(2048, 768, dtype=dtype, device=device())
    b = torch.randn(768, 3072, dtype=dtype, device=device())
    work = lambda: [a @ b for _ in range(4)]  # noqa: E731
    work()
    return 4 * 2.0 * 2048 * 768 * 3072 / min(timed(work) for _ in range(5))


def utilisation(operations: float, seconds: float) -> float | None:
    """Share of the accelerator's peak bf16 rate; None where that is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((rate for part, rate in DENSE_BF16_TFLOPS.items() if part in name), None)
    return None if peak is None else operations / seconds / (peak * 1e12)


class PeakMemory:
    """Bytes resident before the block and at most within it: of this process, or of the accelerator's allocator."""

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = float(torch.cuda.memory_allocated())
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(field)).split()[1])


def in_own_process(script: str, arguments: Sequence[str]) -> dict[str, float]:
    """The JSON object that ``script`` prints as its last line when started afresh: memory is not measured in a process
    that has seen other variants."""
    # Freed blocks go back at once, so that what is resident is what is used.
    settings = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, script, *arguments], check=True, capture_output=True, text=True, env=settings
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, numbers to the right."""
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)


def report(figures: Mapping[str, object], path: str | None) -> None:
    """The figures as one flat object, printed and written where ``--json`` says."""
    for name, value in figures.items():
        print(f"{name:36} {value}")
    if path:
        Path(path).write_text(json.dumps(dict(figures), indent=1) + "\n", encoding="utf-8")
