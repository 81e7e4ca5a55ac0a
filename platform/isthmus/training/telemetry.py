"""How the machines are doing, as values of the logged rows.

MLflow can sample these itself, from a thread that talks to the server; a server that is away then costs the samples.
Here they are part of the rows, which lie in the spool until they are sent. Names are MLflow's own, so that its page of
system metrics shows them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping

import psutil
import torch

from isthmus.training.comm import TorchComm

MOST = 16
"""Nodes and accelerators that are logged one by one; of a larger cluster the first ones."""
GIB = 2.0**30


class Telemetry:
    """Reads the counters of this rank's node and device.

    Args:
        comm: the run's group; building it is collective.
        device: that this rank trains on.
    """

    def __init__(self, comm: TorchComm, device: torch.device) -> None:
        self.comm, self.device = comm, device
        hosts = comm.collect(socket.gethostname())
        self._nodes = list(dict.fromkeys(hosts))
        self._node = self._nodes.index(hosts[comm.rank])
        self._leads = hosts.index(hosts[comm.rank]) == comm.rank
        self._traffic_before = psutil.net_io_counters()
        psutil.cpu_percent()  # the first answer is no measurement; each later one is the mean since the one before

    def read(self) -> dict[str, float]:
        """Values since the call before, of the whole cluster on rank 0 and empty on the others; collective.

        ``memory/host_gib`` and ``memory/device_peak_gib`` are those of the worker that holds the most; the rest is
        by node and accelerator.
        """
        own = {"memory/host_gib": psutil.Process().memory_info().rss / GIB}
        if self.device.type == "cuda":
            own["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            own["memory/device_reserved_gib"] = torch.cuda.memory_reserved(self.device) / GIB
            torch.cuda.reset_peak_memory_stats(self.device)
        shown: dict[str, float] = {}
        if self._leads and self._node < MOST:
            middle = "" if len(self._nodes) == 1 else f"{self._node}/"
            shown |= {f"system/{middle}{name}": value for name, value in self._of_node().items()}
        if self.device.type == "cuda" and self.comm.rank < MOST:
            shown |= {f"system/gpu_{self.comm.rank}_{n}": v for n, v in _of_accelerator(self.device).items()}
        everyone = self.comm.collect((own, shown))
        if self.comm.rank != 0:
            return {}
        found = {name: max(theirs[name] for theirs, _ in everyone) for name in own}
        for _, theirs in everyone:
            found |= theirs
        return found

    def _of_node(self) -> dict[str, float]:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network is not None and self._traffic_before is not None:  # without an interface there are none
            found["network_receive_megabytes"] = (network.bytes_recv - self._traffic_before.bytes_recv) / 1e6
            found["network_transmit_megabytes"] = (network.bytes_sent - self._traffic_before.bytes_sent) / 1e6
        return found


def _of_accelerator(device: torch.device) -> dict[str, float]:
    """Memory in use by all processes; utilisation and power where nvidia-ml-py is installed."""
    free, total = torch.cuda.mem_get_info(device)
    found = {
        "memory_usage_megabytes": (total - free) / 1e6,
        "memory_usage_percentage": 100.0 * (total - free) / total,
    }
    asked: Mapping[str, Callable[[], float]] = {
        "utilization_percentage": lambda: float(torch.cuda.utilization(device)),
        "power_usage_watts": lambda: torch.cuda.power_draw(device) / 1000.0,
    }
    for name, ask in asked.items():
        with contextlib.suppress(Exception):  # no such library, or a device that does not tell
            found[name] = ask()
    return found
