"""Two drivers in one run's folder: the second is refused, and nothing keeps the folder when the first has ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.errors import ConfigError, StorageError
from isthmus.training.alone import alone_in

HOLD = """
import sys
from isthmus.training.alone import alone_in
with alone_in(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_driver_is_refused_until_the_first_has_ended_however_it_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"being trained by process {other.pid} on"),
            alone_in(str(tmp_path / "run")),
        ):
            pytest.fail("two at once")
        with alone_in(str(tmp_path / "another")):
            pass
        other.kill()
        other.wait()
        with alone_in(str(tmp_path / "run")):
            pass


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError), alone_in(str(tmp_path / "file" / "run")):
        pytest.fail("held")


def test_it_is_let_go_of_behind_the_block_and_not_before(tmp_path: Path) -> None:
    for _ in range(2):
        with alone_in(str(tmp_path)), pytest.raises(ConfigError, match="being trained by"), alone_in(str(tmp_path)):
            pytest.fail("two at once")
