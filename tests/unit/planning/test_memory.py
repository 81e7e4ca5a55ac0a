"""Which part of the memory is shared out by which ZeRO stage, and what fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.config import RunConfig
from isthmus.planning import memory
from isthmus.planning.activations import Keeping
from isthmus.planning.communication import exposed_seconds, traffic
from isthmus.planning.offload import moved
from isthmus.planning.shapes import Texts
from isthmus.planning.subject import Subject, examine
from method_cases import build, recipe, run_config

GPU = Keeping(bf16=True, cuda=True)


def subject(method: str, folder: Path, **changes: object) -> Subject:
    run: RunConfig = run_config(recipe(method, folder))
    return examine(run.model_copy(update=changes), Texts(6, 12))


@pytest.mark.parametrize("method", ["blip2_stage1", "blip2_stage2"])
def test_parameters_are_those_of_the_built_module(method: str, tmp_path: Path) -> None:
    stage = build(recipe(method, tmp_path))
    found = subject(method, tmp_path)
    trained = sum(p.numel() for p in stage.module.parameters() if p.requires_grad)
    assert (found.trained, found.held) == (trained, 0)


def test_held_parameters_are_not_trained(tmp_path: Path) -> None:
    run = run_config(recipe("blip2_stage1", tmp_path))
    train = run.train.model_copy(update={"frozen": ("qformer.words.*",)})
    whole, part = subject("blip2_stage1", tmp_path), subject("blip2_stage1", tmp_path, train=train)
    assert part.held > 0
    assert part.trained + part.held == whole.trained


def test_what_each_stage_shares_out(tmp_path: Path) -> None:
    found = subject("blip2_stage2", tmp_path)
    trained = 4.0 * found.trained
    by_stage = [memory.memory(found, stage, 4, 8, GPU) for stage in memory.STAGES]
    assert [m["AdamW's moments"] for m in by_stage] == [2 * trained, *[2 * trained / 8] * 3]
    assert [m["gradients"] for m in by_stage] == [trained, trained, trained / 8, trained / 8]
    assert [m["trained parameters"] for m in by_stage] == [trained] * 3 + [trained / 8]
    assert [m["their master copy"] for m in by_stage] == [0, trained / 8, trained / 8, 0]
    assert found.language is not None
    frozen = [m["language model, frozen"] for m in by_stage]
    assert frozen == [2.0 * found.language.parameters] * 3 + [2.0 * found.language.parameters / 8]  # bf16
    assert by_stage[0]["image encoder, frozen"] == 4.0 * found.vision.parameters  # float32
    assert by_stage[3]["parameters gathered"] > 0


def offloading(folder: Path, **changes: object) -> Subject:
    found = subject("blip2_stage2", folder)
    zero = found.run.zero.model_copy(update=changes)
    return replace(found, run=found.run.model_copy(update={"zero": zero}))


def test_what_offloading_moves_to_the_host(tmp_path: Path) -> None:
    plain, found = subject("blip2_stage2", tmp_path), offloading(tmp_path, offload_optimizer="cpu")
    trained = 4.0 * found.trained
    for stage in memory.STAGES:
        before, after = (memory.memory(which, stage, 4, 8, GPU) for which in (plain, found))
        host = moved(found, stage, 8, GPU, before)
        wanted = {"AdamW's moments": 2 * trained / 8, "their master copy": trained / 8}
        assert host == ({} if stage == 0 else wanted | ({"gradients": trained / 8} if stage > 1 else {}))
        assert after == before | dict.fromkeys(host, 0.0)
        assert after["language model, frozen"] > 0
    both = offloading(tmp_path, offload_optimizer="cpu", offload_parameters="cpu", stage=3)
    assert memory.memory(both, 2, 4, 8, GPU)["language model, frozen"] > 0
    third, whole = memory.memory(both, 3, 4, 8, GPU), memory.memory(plain, 3, 4, 8, GPU)
    assert third["language model, frozen"] == third["trained parameters"] == third["image encoder, frozen"] == 0
    assert moved(both, 3, 8, GPU, whole)["language model, frozen"] == whole["language model, frozen"]
    here = Keeping(bf16=False, cuda=False)
    assert memory.memory(both, 3, 4, 8, here) == memory.memory(plain, 3, 4, 8, here), "there is no other place"


def test_buckets_are_no_larger_than_what_is_trained(tmp_path: Path) -> None:
    found = subject("blip2_stage2", tmp_path)
    sizes = [memory.memory(found, stage, 4, 8, GPU)["gradient buckets"] for stage in memory.STAGES]
    assert sizes == [4.0 * found.trained * times for times in (1, 2, 2, 1)]
    large = replace(found, trained=10**9)
    assert memory.memory(large, 2, 4, 8, GPU)["gradient buckets"] == 2 * 4.0 * 5e8


def test_a_cached_run_holds_no_image_encoder(tmp_path: Path) -> None:
    run = run_config(recipe("blip2_stage1", tmp_path))
    data = run.data.model_copy(update={"placement": "cached", "cache": "there"})
    found = subject("blip2_stage1", tmp_path, data=data)
    assert memory.memory(found, 1, 4, 2, GPU)["image encoder, frozen"] == 0
    assert "image encoder" not in found.flops(4, 2)
    assert "image encoder" in subject("blip2_stage1", tmp_path).flops(4, 2)


def test_the_largest_batch_fits_and_one_more_does_not(tmp_path: Path) -> None:
    found = subject("blip2_stage1", tmp_path)
    room = sum(memory.memory(found, 1, 37, 2, GPU).values())
    assert memory.largest_images(found, 1, 2, GPU, room) == 37
    assert memory.largest_images(found, 1, 2, GPU, room - 1) == 36
    assert memory.largest_images(found, 1, 2, GPU, 1e6) == 0


def test_traffic(tmp_path: Path) -> None:
    found = subject("blip2_stage2", tmp_path)
    assert traffic(found, 2, 4, 1, GPU).total == 0
    trained = 4.0 * found.trained
    for stage in (0, 1, 2):
        moved = traffic(found, stage, 4, 4, GPU)
        assert (moved.gradients, moved.parameters, moved.losses) == (trained * 3 / 4, trained * 3 / 4, 0)
    assert found.language is not None
    whole = 2 * (trained + 2.0 * found.language.parameters) + 4.0 * found.vision.parameters
    assert traffic(found, 3, 4, 4, GPU).parameters == pytest.approx(whole * 3 / 4)


def test_stage1_sends_its_vectors_and_the_negatives_tokens(tmp_path: Path) -> None:
    found = subject("blip2_stage1", tmp_path)
    q, images, workers = found.qformer, 4, 3
    vectors = 4 * images * (q.queries + 1) * q.embed * (workers - 1)
    ids = 2 * 8 * images * found.texts.longest * (workers - 1)
    tokens = 4 * images * found.vision.tokens * found.vision.width * (workers - 1) / workers
    assert traffic(found, 2, images, workers, GPU).losses == pytest.approx(vectors + ids + tokens)


def test_what_the_backward_pass_hides(tmp_path: Path) -> None:
    moved = traffic(subject("blip2_stage2", tmp_path), 2, 4, 4, GPU)
    seconds = moved.gradients
    assert exposed_seconds(moved, 1.0, backward=0.0, overlap=False, stage=2) == pytest.approx(2 * seconds)
    assert exposed_seconds(moved, 1.0, backward=seconds, overlap=True, stage=2) == pytest.approx(seconds)
    assert exposed_seconds(moved, 1.0, backward=seconds / 4, overlap=True, stage=2) == pytest.approx(1.75 * seconds)
