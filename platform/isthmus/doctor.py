"""Looks at a machine and says what is missing, each with its mend. Nothing is installed."""

from __future__ import annotations

import os
import platform as machine
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from isthmus.errors import IsthmusError

Level = Literal["ok", "note", "fault"]

MIN_DISK_GB = 8
MIN_RAM_GB = 6
MIN_SHM_GB = 1


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was looked at.
        level: ``ok``; ``note`` where something optional is missing; ``fault`` where commands will fail.
        found: what there is.
        mend: what to do about it, empty where all is well.
    """

    name: str
    level: Level
    found: str
    mend: str = ""


def examine() -> list[Check]:
    """Every check, in a fixed order. A check that breaks becomes a fault of its own and stops no other."""
    parts: list[Callable[[], Iterable[Check]]] = [
        _python,
        _packages,
        _torch,
        _memory_and_disk,
        _programs,
        _tracking,
        _object_store,
        _cluster,
    ]
    return [check for part in parts for check in _guarded(part)]


def print_checks(checks: Iterable[Check]) -> None:
    """The table on standard output, then each mend."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "note": "yellow", "fault": "red"}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("check", "", "found", "mend"):
        table.add_column(column, overflow="fold")
    for c in checks:
        table.add_row(c.name, f"[{colours[c.level]}]{c.level}[/]", escape(c.found), escape(c.mend))
    Console(highlight=False).print(table)


def _guarded(part: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(part())
    except Exception as error:
        name = part.__name__.strip("_").replace("_", " ")
        return [Check(name, "fault", f"{type(error).__name__}: {error}", "This check itself failed; please report it.")]


def _python() -> Iterator[Check]:
    yield Check("python", "ok", machine.python_version())


def tested_versions() -> dict[str, str]:
    """Package -> version from the repository's constraints.txt; empty where there is no repository."""
    import isthmus

    path = Path(isthmus.__file__).resolve().parents[2] / "constraints.txt"
    if not path.is_file():
        return {}
    pins = (line.split("#")[0].strip().partition("==") for line in path.read_text(encoding="utf-8").splitlines())
    return {name.lower(): version for name, sign, version in pins if sign}


def requirements() -> dict[str, str]:
    """Package -> version specifier that Isthmus itself was installed with (``>=2.6``), extras left out."""
    pattern = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*([<>=!~][^;]*)?(;.*)?$")
    found = (pattern.match(line) for line in metadata.requires("isthmus") or [])
    return {m[1].lower(): (m[2] or "").strip() for m in found if m and "extra" not in (m[3] or "")}


def _packages() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    tested, differing = tested_versions(), []
    for name, wanted in requirements().items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "fault", "not installed", "Run `make setup`.")
            continue
        plain = version.split("+")[0]
        if not SpecifierSet(wanted).contains(plain, prereleases=True):
            yield Check(name, "fault", f"{version}, but {wanted} is needed", "Run `make setup`.")
        elif name in tested and tested[name] != plain:
            differing.append(f"{name} {version} (tested: {tested[name]})")
    if differing:
        mend = "They may work; `make setup` installs the tested ones."
        yield Check("package versions", "note", ", ".join(differing), mend)
    else:
        yield Check("package versions", "ok", f"{len(requirements())} packages as tested")


def _torch() -> Iterator[Check]:
    import torch

    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    try:
        from isthmus.compat import ensure_torchvision

        ensure_torchvision()
        import torchvision

        yield Check("torchvision", "ok", torchvision.__version__)
    except (ImportError, RuntimeError) as error:
        mend = "Install the torchvision that belongs to this torch: `make setup`."
        yield Check("torchvision", "fault", str(error).splitlines()[0], mend)
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Check("GPU", "ok", names)
    elif shutil.which("nvidia-smi"):
        mend = "Compare `nvidia-smi` with torch.version.cuda; a newer driver or the CUDA build of torch is needed."
        yield Check("GPU", "note", f"there is a driver, but torch {torch.__version__} sees no device", mend)
    else:
        yield Check("GPU", "ok", "none; everything runs on the CPU")


def _memory_and_disk() -> Iterator[Check]:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield _enough("memory", ram, MIN_RAM_GB, "Use fewer workers: cluster.workers=1.")
    free = shutil.disk_usage(Path()).free / 2**30
    yield _enough("free disk here", free, MIN_DISK_GB, "Free some, or work in a folder on a larger disk.")
    shm = Path("/dev/shm")  # noqa: S108 - only its size is looked at
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / 2**30
        mend = "Ray falls back to the slower /tmp; in a container start it with --shm-size=4g."
        yield _enough("shared memory", size, MIN_SHM_GB, mend, level="note")


def _enough(name: str, gigabytes: float, wanted: float, mend: str, level: Level = "fault") -> Check:
    found = f"{gigabytes:.1f} GiB"
    if gigabytes >= wanted:
        return Check(name, "ok", found)
    return Check(name, level, f"{found}, at least {wanted} is wanted", mend)


def _programs() -> Iterator[Check]:
    clients = [name for name in ("pip", "npm", "apt-get") if shutil.which(name)]
    missing = [name for name in ("pip", "npm", "apt-get") if name not in clients]
    if missing:
        mend = f"What comes through {', '.join(missing)} is out of reach; install it, or fetch --synthetic."
        yield Check("package clients", "note", ", ".join(clients) or "none", mend)
    else:
        yield Check("package clients", "ok", ", ".join(clients))
    java = shutil.which("java")
    if java is None:
        mend = "Without Java captions get no METEOR and no PTB tokenizer; any headless JRE will do."
        yield Check("java", "note", "none", mend)
    else:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=False).stderr
        yield Check("java", "ok", said.splitlines()[0] if said else java)


def _tracking() -> Iterator[Check]:
    from isthmus.registry.store import check_tracking, tracking_uri

    uri = tracking_uri()
    try:
        check_tracking(uri)
        yield Check("MLflow", "ok", _without_password(uri))
    except IsthmusError as error:
        yield Check("MLflow", "fault", error.problem, error.mend)


def _object_store() -> Iterator[Check]:
    endpoint, key = os.environ.get("AWS_ENDPOINT_URL", ""), os.environ.get("AWS_ACCESS_KEY_ID")
    if not endpoint and not key:
        yield Check("S3", "ok", "not set up; needed for s3:// URLs only")
        return
    if bool(key) != bool(os.environ.get("AWS_SECRET_ACCESS_KEY")):
        yield Check("S3", "fault", "half a key pair", "Set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
        return
    if not endpoint:
        yield Check("S3", "ok", "keys set, the provider's own endpoint")
        return
    parts = urlsplit(endpoint)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
        yield Check("S3", "ok", endpoint)
    except (OSError, ValueError) as error:
        mend = "Start the object store or correct AWS_ENDPOINT_URL (http://HOST:PORT)."
        yield Check("S3", "fault", f"{endpoint} does not answer ({error})", mend)


def _cluster() -> Iterator[Check]:
    address = os.environ.get("RAY_ADDRESS")
    yield Check("Ray", "ok", f"commands join RAY_ADDRESS={address}" if address else "commands start a local cluster")


def _without_password(uri: str) -> str:
    return re.sub(r"//([^/:@]+):[^/@]+@", r"//\1:***@", uri)
