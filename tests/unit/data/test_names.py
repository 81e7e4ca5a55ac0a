"""Files of class names: the three forms, and what is refused by file and label."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.data.names import read_names, read_table
from isthmus.errors import DataError


def written(folder: Path, data: str | bytes) -> str:
    file = folder / "names"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(file)


@pytest.mark.parametrize(
    ("data", "table"),
    [
        ("tench\n goldfish \n\n", {"0": "tench", "1": "goldfish"}),
        ("\ufefftench\r\ngoldfish", {"0": "tench", "1": "goldfish"}),
        ('\ufeff ["tench", "goldfish"]', {"0": "tench", "1": "goldfish"}),
        ('{"n01": "tench", "n02": "goldfish"}', {"n01": "tench", "n02": "goldfish"}),
    ],
)
def test_each_form_is_read(data: str, table: dict[str, str], tmp_path: Path) -> None:
    url = written(tmp_path, data)
    assert read_table(url) == table and read_names(url) == tuple(table.values())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"0": ["n01440764", "tench"]}', r"name of class '0' is \[\"n01440764\", \"tench\"\], which is no text"),
        ("[1, 2]", "name of class '0' is 1"),
        ('["tench", ', "begins as JSON and is not valid"),
        ("\n\n", "names no class"),
        ("", "names no class"),
        (b"t\xe4nch", "not UTF-8"),
    ],
)
def test_what_holds_no_names_is_refused_by_file(data: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as error:
        read_names(written(tmp_path, data))
    with pytest.raises(DataError, match=said):
        read_table(written(tmp_path, data))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("data", ["cat\n\ndog", '["cat", "", "dog"]'])
def test_a_number_without_a_name_does_not_shift_the_others(data: str, tmp_path: Path) -> None:
    assert read_names(written(tmp_path, data)) == ("cat", "dog")
    with pytest.raises(DataError, match="no name for the class '1'"):
        read_table(written(tmp_path, data))
