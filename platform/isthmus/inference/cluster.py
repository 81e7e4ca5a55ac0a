"""Reaching a Ray cluster from a bulk job."""

from __future__ import annotations

import logging

import ray

from isthmus.errors import IsthmusError
from isthmus.ray_session import begin, end, joins_cluster

log = logging.getLogger(__name__)


def connect(actors: int, cpus: float, gpus: float) -> bool:
    """Joins the running cluster (``RAY_ADDRESS``, a submitted job) or starts one on this machine.

    A local cluster is given as many logical CPUs as the actors ask for: on a machine with fewer cores they share them,
    where Ray would otherwise wait for ever.

    Args:
        actors, cpus, gpus: processes, and what each needs.

    Returns:
        True where this call started or joined the cluster, so that the caller leaves it.

    Raises:
        IsthmusError: this machine has not the GPUs that one actor needs.
    """
    started = begin(actors * cpus)
    try:
        _look_at_nodes(cpus, gpus)
    except IsthmusError:
        if started:
            end()
        raise
    return started


def _look_at_nodes(cpus: float, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= gpus for n in nodes):
        return
    most = {kind: max((n.get(kind, 0) for n in nodes), default=0) for kind in ("CPU", "GPU")}
    problem = (
        f"An actor needs {cpus:g} CPUs and {gpus:g} GPUs; the largest node has {most['CPU']:g} and {most['GPU']:g}."
    )
    if joins_cluster():  # a cluster that scales on demand may bring a node that fits
        log.warning("%s The job waits until a node that fits joins the cluster.", problem)
        return
    raise IsthmusError(problem, "Lower cpus_per_actor or gpus_per_actor.")
