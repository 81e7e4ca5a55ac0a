"""A real object store behind a proxy that fails on order: every sample is read, or said to be missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus import storage
from isthmus.data import ranges
from isthmus.data.manifest import Manifest, index
from isthmus.data.readers import Failure, RawSample, read_rows
from isthmus.testing import flaky as faults
from isthmus.testing.flaky import Fault, Rule, every, flaky
from isthmus.testing.s3 import S3Server
from isthmus.testing.shards import make_dataset

pytestmark = pytest.mark.s3

SAMPLES = 24


@pytest.fixture(scope="module")
def lake(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Indexed pairs in a bucket."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in s3_server.environment.items():
            patched.setenv(name, value)
        folder = make_dataset(tmp_path_factory.mktemp("lake") / "data", SAMPLES, per_shard=8)
        url = s3_server.url("flaky")
        for file in sorted(folder.iterdir()):
            storage.write_bytes(storage.join(url, file.name), file.read_bytes())
        index(url)
        yield url


def read(
    url: str, server: S3Server, rule: Rule, monkeypatch: pytest.MonkeyPatch, samples: int = SAMPLES
) -> tuple[list, int, faults.Flaky]:
    """Samples through the proxy, one by one; how often a read was tried again; and the proxy."""
    ranges.open_range.forget()  # handles know their endpoint
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with flaky(server.endpoint, rule) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        manifest = Manifest.load(url, verify=False)
        before = int(ranges.retries)
        found = [next(iter(read_rows(manifest, [row]))) for row in reversed(range(samples))]
        return found, int(ranges.retries) - before, proxy


@pytest.mark.parametrize("fault", ["error", "reset", "slow", "cut"])
def test_every_sample_is_read_whatever_the_store_does(
    lake: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(faults, "SLOW_S", 0.001)
    plain, none, _ = read(lake, s3_server, lambda *_: None, monkeypatch)
    assert none == 0 and len(plain) == SAMPLES and all(isinstance(sample, RawSample) for sample in plain)
    found, _, proxy = read(lake, s3_server, every(3, fault), monkeypatch)
    assert proxy.faults[fault] >= SAMPLES // 3, "nothing went wrong"
    assert found == plain


def test_a_store_that_fails_for_good_is_a_failure_with_the_reason_of_each_sample(
    lake: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges.time, "sleep", lambda seconds: None)

    def never(method: str, path: str, _number: int) -> Fault | None:
        return "error" if ".tar" in path and method == "GET" else None

    found, again, _ = read(lake, s3_server, never, monkeypatch, samples=1)
    assert len(found) == 1 and all(isinstance(sample, Failure) for sample in found)
    assert again == 4
    assert all("after 5 attempts" in sample.reason for sample in found)


def test_an_object_that_was_cut_since_is_named(
    lake: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = s3_server.url("cut")
    for file in sorted(make_dataset(tmp_path / "data", 8, per_shard=8).iterdir()):
        storage.write_bytes(storage.join(url, file.name), file.read_bytes())
    index(url)
    manifest = Manifest.load(url)
    shard = manifest.url(0)
    whole = storage.read_bytes(shard)
    storage.write_bytes(shard, whole[: len(whole) // 2])
    ranges.open_range.forget()
    before = int(ranges.retries)
    found = list(read_rows(manifest, range(8)))
    lost = [sample for sample in found if isinstance(sample, Failure)]
    assert len(found) == 8 and 0 < len(lost) < 8, "what lies before the cut is still read"
    assert all("index it again" in sample.reason for sample in lost)
    assert int(ranges.retries) == before, "what is not there is not asked for again"
