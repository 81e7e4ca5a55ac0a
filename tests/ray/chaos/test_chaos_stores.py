"""Training from an object store that fails: behind a proxy before a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chaos_method
import pytest
from chaos_help import Report, differences, judge, quarantined

from isthmus import storage
from isthmus.data import ranges
from isthmus.data.manifest import Manifest, index
from isthmus.testing import flaky as faults
from isthmus.testing.flaky import Fault, every, flaky
from isthmus.testing.s3 import S3Server
from isthmus.training.driver import fit
from isthmus.training.metrics import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def lake(s3_server: S3Server, ground: Path) -> Iterator[str]:
    """The same data in a bucket."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in s3_server.environment.items():
            patched.setenv(name, value)
        yield upload(ground, s3_server.url("chaos"))


def upload(ground: Path, url: str) -> str:
    for file in sorted((ground / "data").glob("*.tar")):
        storage.write_bytes(storage.join(url, file.name), file.read_bytes())
    index(url)
    return url


NAMES: dict[Fault, str] = {
    "error": "S3 answers 503",
    "reset": "S3 resets connections",
    "stall": "S3 does not answer",
    "slow": "S3 reads are slow",
    "cut": "S3 answers are cut short",
}


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=pytest.mark.fault(name)) for fault, name in NAMES.items()])
def test_a_run_reads_through_a_store_that_fails(
    ground: Path, control: str, lake: str, s3_server: S3Server, report: Report, monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:  # fmt: skip
    monkeypatch.setattr(faults, "STALL_S", 4.0)
    ranges.open_range.forget()
    with flaky(s3_server.endpoint, every(4, fault)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        fit(chaos_method.recipe(ground, f"s3-{fault}", data=lake), progress=False)
        struck = proxy.faults[fault]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    ranges.open_range.forget()
    rows = read_rows(ground / "runs" / f"s3-{fault}" / "metrics.jsonl")
    assert struck >= 3, f"too little went wrong: {struck} of {proxy.requests} requests"
    waited = max(row["metrics"]["data_wait_share"] * row["metrics"]["step_s"] for row in rows[1:])
    report.add(
        NAMES[fault],
        judge(ground, f"s3-{fault}", data=lake),
        recovery_s=waited,
        differences=differences(ground, f"s3-{fault}", control),
        note=f"{struck} of {proxy.requests} requests failed; the longest wait of a step counts as recovery",
    )


@pytest.mark.fault("object cut while a run reads it")
def test_an_object_is_cut_while_a_run_reads_it(
    ground: Path, control: str, s3_server: S3Server, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in s3_server.environment.items():
        monkeypatch.setenv(variable, value)
    url = upload(ground, s3_server.url("cut"))
    shard = Manifest.load(url).url(1)
    whole = storage.read_bytes(shard)
    gone = behind(Manifest.load(url), 1, len(whole) // 2)
    cuts: list[str] = []

    def cut(method: str, path: str, _number: int) -> Fault | None:
        """At the first read of the shard: half of it is gone from then on."""
        if method == "GET" and "shard-00001.tar" in path and not cuts:
            cuts.append(path)
            storage.write_bytes(shard, whole[: len(whole) // 2])
        return None

    ranges.open_range.forget()
    with flaky(s3_server.endpoint, cut) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        fit(chaos_method.recipe(ground, "cut", data=url), progress=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    ranges.open_range.forget()
    aside = quarantined(ground, "cut")
    assert cuts and set(aside) == gone
    assert all("it has changed, index it again" in reason for reason in aside.values()), aside
    report.add(
        "object cut while a run reads it",
        judge(ground, "cut", data=url, bad=gone),
        note=f"{len(aside)} samples behind the cut in quarantine, each with its place and reason",
    )


def behind(manifest: Manifest, shard: int, place: int) -> frozenset[str]:
    """Keys of the shard's samples that end behind byte ``place``."""
    rows = [row for row in manifest.table.to_pylist() if row["shard"] == shard]
    parts = ("image", "text", "meta")
    return frozenset(r["key"] for r in rows if max(r[f"{p}_offset"] + r[f"{p}_length"] for p in parts) > place)
