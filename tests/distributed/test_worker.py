"""The training loop on two gloo ranks, without Ray: ZeRO stages, resuming, what is saved, what stops a run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny_method as tiny
from isthmus.config import RunConfig, TextConfig
from isthmus.data.features import build_cache
from isthmus.data.manifest import Manifest, index
from isthmus.methods import METHODS
from isthmus.methods.projector import ProjectorConfig
from isthmus.testing.backbones import tiny_bert, tiny_cnn_config
from isthmus.testing.gloo import run_ranks
from isthmus.testing.shards import make_dataset
from training_cases import worker_of

STEPS = 9
STAGES = (0, 1, 2, 3)
PLACEMENTS = {"inline": lambda root: {}, "streamed": lambda root: {}, "cached": lambda root: {"cache": f"{root}/cache"}}
STILL = {"steps": 3, "global_batch": 8, "lr": 1e-2, "frozen": ("hidden.*",)}


def recipe(root: str, name: str, *, stage: int = 2, workers: int = 2, **method: Any) -> RunConfig:
    train = {"precision": "fp32"}  # bf16 rounds otherwise for other numbers of rows
    return tiny.recipe(root, name, method=method, train=train, zero={"stage": stage}, cluster={"workers": workers})


def convolutional(root: str, stage: int, max_length: int = 32, **data: Any) -> RunConfig:
    """Projectors on a real CNN whose features are computed while training, or where ``data`` says."""
    method = ProjectorConfig(vision=tiny_cnn_config(), text=TextConfig(weights=f"{root}/text", max_length=max_length))
    train = {"steps": 2, "checkpoint_every": 2, "log_every": 1, "precision": "fp32"}
    name = "-".join(map(str, ("cnn", stage, max_length, *data.values()))).replace("/", "_")
    return tiny.recipe(root, name, data=data, train=train, zero={"stage": stage}).model_copy(update={"method": method})


def run_one(config: RunConfig, parent: str | None = None) -> dict[str, Any]:
    """One worker's life; what it said, and how it ended."""
    spec = tiny.SPEC if isinstance(config.method, tiny.TinyConfig) else METHODS[config.method.name]
    worker, out = worker_of(config, spec, parent)
    fault = None
    try:
        worker.train()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    frozen = tiny.frozen_state(worker.stage.module) if config.zero.stage < 3 else {}
    kept = {"rows": out.rows, "events": out.events, "artefacts": out.artefacts}
    return {**kept, "fault": fault, "frozen": frozen}


def scenarios(root: str) -> dict[str, Any]:
    """All of them in one pair of processes, since starting the processes is what takes the time."""
    out = {f"zero{stage}": run_one(recipe(root, f"zero{stage}", stage=stage)) for stage in (0, 1, 2, 3)}
    for stage in (0, 3):
        hardly = {"steps": 1, "lr": 1e-12, "min_lr": 0.0, "precision": "fp32"}
        child = tiny.recipe(root, f"child{stage}", train=hardly, zero={"stage": stage}, cluster={"workers": 2})
        out[child.name] = run_one(child, f"{root}/runs/zero2/artefact")
    broken = recipe(root, "broken", break_at=7)
    out["broken"], out["mended"] = run_one(broken), run_one(broken)
    for stage in STAGES:  # left after six steps by two ranks under one ZeRO stage, taken up under every other
        run_one(recipe(root, f"left{stage}", stage=stage, break_at=7))
    for before in STAGES:
        for after in STAGES:
            if torch.distributed.get_rank() == 0:
                shutil.copytree(f"{root}/runs/left{before}", f"{root}/runs/moved{before}{after}")
            torch.distributed.barrier()
            out[f"moved{before}{after}"] = run_one(recipe(root, f"moved{before}{after}", stage=after))
    out["again"] = run_one(recipe(root, "zero2"))
    out |= {f"cnn{stage}": run_one(convolutional(root, stage)) for stage in (2, 3)}
    for placement, extra in PLACEMENTS.items():
        out[placement] = run_one(convolutional(root, 2, augment=False, placement=placement, **extra(root)))
    out["streamed augmented"] = run_one(convolutional(root, 2, placement="streamed"))
    out["cut"] = run_one(convolutional(root, 2, max_length=3))
    out["still"] = run_one(tiny.recipe(root, "still", train=STILL))
    out["nan"] = run_one(recipe(root, "nan", nan_at=4))
    return out


def alone(root: str) -> dict[str, Any]:
    """On one rank: goes on from what two ranks left."""
    out = {}
    for stage in (2, 3):
        shutil.copytree(f"{root}/runs/left{stage}", f"{root}/runs/fewer{stage}")
        out[f"fewer{stage}"] = run_one(recipe(root, f"fewer{stage}", stage=stage, workers=1))
    return out


def alone_before(root: str) -> None:
    """On one rank: leaves something to two."""
    for stage in (2, 3):
        run_one(recipe(root, f"more{stage}", stage=stage, workers=1, break_at=7))


def together(root: str) -> dict[str, Any]:
    return {f"more{stage}": run_one(recipe(root, f"more{stage}", stage=stage)) for stage in (2, 3)}


@pytest.fixture(scope="module")
def fewer(made) -> dict[str, Any]:
    return run_ranks(alone, 1, str(made[0]))[0]


@pytest.fixture(scope="module")
def more(made) -> dict[str, Any]:
    run_ranks(alone_before, 1, str(made[0]))
    return run_ranks(together, 2, str(made[0]), timeout_s=120)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("worker")
    index(str(make_dataset(root / "data", 20)))
    build_cache(str(root / "data"), str(root / "cache"), tiny_cnn_config(), dtype="float32")
    tiny_bert(root / "text")
    return root, run_ranks(scenarios, 2, str(root), timeout_s=240)


def resumed(events: list[dict[str, Any]]) -> int:
    """Where the run went on: the checkpoint of step 6, or that of step 3 if the other was still being written."""
    [event] = [e for e in events if e["kind"] == "resumed"]
    return int(event["step"])


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / name / "artefact" / "model.safetensors")


def losses(result: dict[str, Any]) -> dict[int, float]:
    return {row["step"]: row["metrics"]["loss"] for row in result["rows"]}


def test_zero_stages_train_the_same_model(made) -> None:
    root, (first, _) = made
    expected = weights(root, "zero0")
    assert set(expected) == {"hidden.weight", "hidden.bias", "out.weight", "out.bias", "temperature"}
    for stage in (1, 2, 3):
        assert first[f"zero{stage}"]["fault"] is None
        for name, value in weights(root, f"zero{stage}").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(losses(first[f"zero{stage}"]), losses(first["zero0"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_goes_on_from_its_parent_s_tensors(made, stage: int) -> None:
    root, (first, _) = made
    assert first[f"child{stage}"]["fault"] is None
    parent = weights(root, "zero2")
    for name, value in weights(root, f"child{stage}").items():
        torch.testing.assert_close(value, parent[name], rtol=0, atol=1e-9)


def test_an_encoder_of_convolutions_may_run_in_the_workers(made) -> None:
    _, (first, _) = made
    assert (first["cnn2"]["fault"], first["cnn3"]["fault"]) == (None, None)
    assert sorted(losses(first["cnn2"])) == [1, 2]
    torch.testing.assert_close(losses(first["cnn3"]), losses(first["cnn2"]), rtol=0, atol=2e-5)


def test_a_sheet_shows_pairs_of_the_last_batch_and_the_model_s_own_captions(made) -> None:
    root, (first, second) = made
    sheets = {name: first[name]["artefacts"] for name in (*PLACEMENTS, "cnn3")}
    listed = {name: json.loads(sheet["samples/step-00000002.json"]) for name, sheet in sheets.items()}
    ids = {int(i) for i in Manifest.load(str(root / "data")).ids}
    for name, pairs in listed.items():
        with Image.open(io.BytesIO(sheets[name]["samples/step-00000002.png"])) as sheet:
            assert sheet.format == "PNG" and np.asarray(sheet)[:, :160].std() > 10, "there are images"
        assert 2 <= len(pairs) <= 6 and {pair["id"] for pair in pairs} <= ids
        captions = {pair["caption"] for pair in pairs}
        assert all(captions), name
        assert {how for pair in pairs for how in pair["own"]} == (set() if name == "cnn3" else {"matched"}), name
    assert listed["inline"] == listed["streamed"] == listed["cached"]
    assert second["inline"]["artefacts"] == {}, "one rank draws"
    assert [e for name in first for e in first[name]["events"] if e["kind"] == "unsampled"] == []


def test_where_the_features_are_computed_does_not_matter(made) -> None:
    root, (first, _) = made
    assert {name: first[name]["fault"] for name in (*PLACEMENTS, "streamed augmented")} == dict.fromkeys(
        (*PLACEMENTS, "streamed augmented")
    )
    assert losses(first["streamed"]) == losses(first["inline"])
    assert losses(first["streamed augmented"]) == losses(first["cnn2"]) != losses(first["inline"])
    torch.testing.assert_close(losses(first["cached"]), losses(first["inline"]), rtol=0, atol=1e-5)
    recorded = [
        json.loads((file / "artefact" / "bases.json").read_text()) for file in sorted((root / "runs").glob("cnn-2-32*"))
    ]
    assert (
        len(recorded) == 5
        and len({base["digest"] for bases in recorded for base in bases if base["role"] == "vision"}) == 1
    )


def test_only_the_declared_parts_move(made) -> None:
    root, ranks = made
    torch.manual_seed(0)
    fresh = tiny.TinyModule(tiny.TinyConfig(), None)
    for result in ranks:
        for name, value in tiny.frozen_state(fresh).items():
            assert torch.equal(result["zero2"]["frozen"][name], value), name
    for name, value in weights(root, "zero2").items():
        assert not torch.equal(value, fresh.state_dict()[name]), f"{name} was not trained"


def test_parts_frozen_by_glob_stay_and_are_saved(made) -> None:
    root, (first, _) = made
    torch.manual_seed(0)
    fresh = tiny.TinyModule(tiny.TinyConfig(), None).state_dict()
    assert first["still"]["fault"] is None
    for name, value in weights(root, "still").items():
        assert torch.equal(value, fresh[name]) == name.startswith("hidden."), name
    [event] = [e for e in first["still"]["events"] if e["kind"] == "verdict"]
    assert ["hidden.weight", "frozen", "192"] in [line.split() for line in event["table"].splitlines()]


def test_checkpoints_hold_the_trained_tensors_once(made) -> None:
    root, _ = made
    folders = sorted((root / "runs" / "zero2" / "checkpoints").iterdir())
    assert len(folders) == 2, "train.keep_checkpoints is 2"
    trained = {"hidden.weight", "hidden.bias", "out.weight", "out.bias", "temperature"}
    for folder in folders:
        shares = [set(load_file(file)) for file in sorted(folder.rglob("training-*.safetensors"))]
        assert len(shares) == 2 and not shares[0] & shares[1], "every rank writes a share of its own"
        assert shares[0] | shares[1] == {f"{k}/{n}" for k in ("parameter", "exp_avg", "exp_avg_sq") for n in trained}


def test_a_broken_run_resumes_to_the_undisturbed_result(made) -> None:
    root, (first, _) = made
    assert "connection closed" in first["broken"]["fault"]
    assert first["mended"]["fault"] is None
    assert resumed(first["mended"]["events"]) in (3, 6)
    assert losses(first["mended"])[STEPS] == losses(first["zero2"])[STEPS]
    for name, value in weights(root, "zero2").items():
        assert torch.equal(weights(root, "broken")[name], value), name


@pytest.mark.parametrize("after", STAGES)
@pytest.mark.parametrize("before", STAGES)
def test_any_zero_stage_goes_on_from_any_other(before: int, after: int, made) -> None:
    root, (first, _) = made
    found = first[f"moved{before}{after}"]
    assert found["fault"] is None
    assert resumed(found["events"]) in (3, 6)
    assert losses(found)[STEPS] == pytest.approx(losses(first["zero2"])[STEPS], abs=2e-6)
    for name, value in weights(root, f"moved{before}{after}").items():
        torch.testing.assert_close(value, weights(root, "zero2")[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("change", ["fewer", pytest.param("more", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [2, 3])
def test_any_number_of_workers_goes_on(stage: int, change: str, made, request: pytest.FixtureRequest) -> None:
    root, (first, _) = made
    found = request.getfixturevalue(change)[f"{change}{stage}"]
    assert found["fault"] is None
    assert resumed(found["events"]) in (3, 6)
    assert losses(found)[STEPS] == pytest.approx(losses(first["zero2"])[STEPS], abs=1e-5)
    for name, value in weights(root, f"{change}{stage}").items():
        torch.testing.assert_close(value, weights(root, "zero2")[name], rtol=0, atol=1e-5)


def test_a_run_at_its_end_only_exports(made) -> None:
    root, (first, _) = made
    assert first["again"]["rows"] == [] and first["again"]["fault"] is None
    assert (root / "runs" / "zero2" / "artefact" / "recipe.yaml").exists()


def test_a_loss_that_is_no_number_stops_every_rank_and_names_the_samples(made) -> None:
    root, ranks = made
    for result in ranks:
        assert "no finite number at step 4" in result["nan"]["fault"]
        assert "parameter norm" in result["nan"]["fault"]
    ids = {int(i) for i in Manifest.load(str(root / "data")).ids}
    named = ranks[0]["nan"]["fault"].split("sample ids by worker: ")[1].split(").")[0]
    listed = [int(n) for n in named.replace("[", "").replace("]", "").split(",")]
    assert len(listed) == 8 and set(listed) <= ids


def test_captions_that_the_limit_cuts_stop_every_rank(made) -> None:
    _, ranks = made
    for result in ranks:
        assert "longer than the recipe's max_length" in result["cut"]["fault"]
        assert "Raise method.text.max_length" in result["cut"]["fault"]
        assert result["cut"]["rows"] == [], "found at the first step"


def test_rows_say_what_a_reader_needs(made) -> None:
    _, (first, second) = made
    row = first["zero2"]["rows"][-1]
    assert row["step"] == STEPS
    assert row["metrics"].keys() >= {
        "loss", "loss_fit", "temperature", "lr", "grad_norm", "images_per_s", "tokens_per_s", "data_wait_share",
        "step_s", "tokens_per_step", "samples_seen", "clipped_share", "grad_norm/hidden", "grad_norm/frozen",
        "memory/host_gib", "system/cpu_utilization_percentage", "system/system_memory_usage_megabytes",
    }  # fmt: skip
    assert second["zero2"]["rows"] == [], "one rank writes"
    [event] = [e for e in first["zero2"]["events"] if e["kind"] == "references"]
    assert event["references"] == {"loss_fit": {"chance": 0.33, "floor": 0.0}}
