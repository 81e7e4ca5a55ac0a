"""Every method through the same commands: train, register, resume, evaluate, embed or caption, serve.

A new entry of METHODS falls under it by its recipe in method_cases; nothing here knows a method by name.
"""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from isthmus import cli
from isthmus.config import to_yaml
from isthmus.contracts import Answers, Captions, Embeds
from isthmus.methods import METHODS
from isthmus.registry.models import resolve
from isthmus.testing.shards import image_bytes, write_tar
from isthmus.training.metrics import read_rows
from method_cases import ANSWERS, CAPTIONS, build, recipe, run_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
EVERY = pytest.mark.parametrize("method", sorted(METHODS))
IMAGES = 24
URI = "sqlite:///{}/mlflow.db"


class Shell:
    """The ``isthmus`` command in this process, on the tests' cluster."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: str) -> Any:
        """What the command prints with ``--json``; it has to end well."""
        before = signal.getsignal(signal.SIGTERM)
        self.capfd.readouterr()  # what libraries said while a test prepared something
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main([*words, "--json"])
        finally:
            signal.signal(signal.SIGTERM, before)
        shown = self.capfd.readouterr()
        assert not ended.value.code, shown.err
        return json.loads(shown.out)


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capfd)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Any) -> Iterator[Path]:
    """Indexed pairs, and the place of all runs and models."""
    folder = tmp_path_factory.mktemp("conformance")
    members: dict[str, bytes] = {}
    for number in range(IMAGES):
        members[f"s{number:03d}.png"] = image_bytes(number, (40, 40))
        members[f"s{number:03d}.txt"] = CAPTIONS[number % len(CAPTIONS)].encode()
        asked = {"question": "what is it", "answers": [ANSWERS[number % len(ANSWERS)]]}
        members[f"s{number:03d}.json"] = json.dumps({"questions": [asked]}).encode()
    write_tar(folder / "data" / "shard-0.tar", members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", URI.format(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(home: Path) -> dict[str, str]:
    """URI of each method's model, as far as it has been trained."""
    return {}


def train(method: str, home: Path, shell: Shell, steps: int) -> dict[str, Any]:
    """``isthmus train`` of the method's small recipe: two steps in this process, any more in a worker."""
    if not (home / "data" / "manifest.json").exists():
        shell("data", "index", str(home / "data"))
    file = home / f"{method}.yaml"
    file.write_text(to_yaml(run_config(recipe(method, home / "parts"))), encoding="utf-8")
    return shell(
        "train", str(file), f"name={method}", f"storage={home}/runs", f"data.train={home}/data",
        "data.max_cut_share=1.0", f"train.steps={steps}", "train.global_batch=8", "train.log_every=1",
        "train.checkpoint_every=2", f"cluster.workers={int(steps > 2)}", f"model={{name: {method}}}",
    )  # fmt: skip


def uri_of(method: str, home: Path, shell: Shell, trained: dict[str, str]) -> str:
    if method not in trained:
        train(method, home, shell, 2)
        trained[method] = train(method, home, shell, 4)["uri"]
    return trained[method]


def abilities(method: str, home: Path) -> set[type]:
    module = build(recipe(method, home / "parts")).module
    return {kind for kind in (Embeds, Captions, Answers) if isinstance(module, kind)}


@EVERY
def test_a_run_is_registered_and_resumed_with_more_steps(
    method: str, home: Path, shell: Shell, trained: dict[str, str]
) -> None:
    first = train(method, home, shell, 2)
    assert first["uri"] == f"models:/{method}@candidate"
    rows = home / "runs" / method / "metrics.jsonl"
    assert [row["step"] for row in read_rows(rows)] == [1, 2]
    version = resolve(f"models:/{method}/1")
    assert (Path(version.path) / "recipe.yaml").is_file() and version.lineage["data"]["samples"] == IMAGES

    again = train(method, home, shell, 4)
    assert [row["step"] for row in read_rows(rows)] == [1, 2, 3, 4], "steps were lost or done twice"
    assert resolve(again["uri"]).version == "2"
    cost = json.loads((home / "runs" / method / "cost.json").read_text())
    assert cost["trainable_parameters"] > 0 and cost["seconds"] > cost["stepping_seconds"] > 0
    trained[method] = again["uri"]


@EVERY
def test_it_is_evaluated_by_what_it_can_do(method: str, home: Path, shell: Shell, trained: dict[str, str]) -> None:
    uri, able = uri_of(method, home, shell, trained), abilities(method, home)
    assert able, "a method that neither embeds nor captions nor answers is of no use to anybody"
    named = {Embeds: "retrieval", Captions: "captioning", Answers: "vqa"}
    tasks = [task for kind, task in named.items() if kind in able]
    out = home / "evaluations" / method
    found = shell(
        "evaluate", f"model={uri}", f"data={home}/data", f"tasks={json.dumps(tasks)}", f"out={out}",
        "meteor=false", "max_new_tokens=4",
    )  # fmt: skip
    if Embeds in able:
        assert found["images"] == IMAGES and found["tr_at_1_chance"] > 0
        assert 0 <= found["tr_at_1"] <= found["tr_at_5"] <= 1 and 0 <= found["ir_at_1"] <= found["ir_at_5"] <= 1
    if Captions in able:
        assert found["cider"] >= 0 and "cider_permuted" in found
    if Answers in able:
        assert 0 <= found["vqa_exact_match"] <= 1 and found["questions"] == IMAGES
    assert json.loads((out / "metrics.json").read_text())["data_digest"] == found["data_digest"]


@EVERY
def test_it_embeds_or_captions_a_whole_set(method: str, home: Path, shell: Shell, trained: dict[str, str]) -> None:
    uri, able = uri_of(method, home, shell, trained), abilities(method, home)
    if Embeds in able:
        out = home / "vectors" / method
        report = shell("embed", f"model={uri}", f"data={home}/data", f"out={out}")
        assert (report["expected"], report["images"], report["quarantined"]) == (IMAGES, IMAGES, 0)
        assert np.allclose([np.linalg.norm(row["embedding"]) for row in texts_of(out)], 1.0, atol=1e-4)
    if able & {Captions, Answers}:
        out = home / "captions" / method
        asked = ["prompt=what is it"] if Answers in able else []
        report = shell("caption", f"model={uri}", f"data={home}/data", f"out={out}", "max_new_tokens=4", *asked)
        assert (report["expected"], report["captioned"], report["quarantined"]) == (IMAGES, IMAGES, 0)


def texts_of(out: Path) -> list[dict[str, Any]]:
    return [row for part in sorted((out / "texts").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def test_one_service_answers_for_all_of_them(home: Path, shell: Shell, trained: dict[str, str]) -> None:
    from isthmus.config import ServeConfig
    from isthmus.serving.app import serve, shutdown

    uris = {method: uri_of(method, home, shell, trained) for method in sorted(METHODS)}
    config = ServeConfig(models=uris, port=0, auth="none", cpus_per_replica=0.2, timeout_s=120)
    url = serve(config, block=False)
    try:
        listed = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
        assert {one["id"] for one in listed} == set(METHODS)
        for method in METHODS:
            able = abilities(method, home)
            if Embeds in able:
                check_vectors(method, home, ask(url, "embeddings", method))
            if able & {Captions, Answers}:
                said = ask(url, "chat/completions", method)(question(asked=Answers in able))
                content = said["choices"][0]["message"]["content"]
                assert isinstance(content, str) and (Captions in able or content in ANSWERS)
                assert said["usage"]["completion_tokens"] >= 1
    finally:
        shutdown()


def ask(url: str, route: str, model: str) -> Callable[[dict[str, Any]], Any]:
    def post(body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{url}/v1/{route}", json={"model": model, **body}, timeout=120)
        assert answer.status_code == httpx.codes.OK, f"{model}: {answer.text}"
        return answer.json()

    return post


def picture(number: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(image_bytes(number, (40, 40))).decode()}"


def question(asked: bool) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture(0)}}]
    if asked:
        content.append({"type": "text", "text": "what is it"})
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


def check_vectors(method: str, home: Path, post: Callable[[dict[str, Any]], Any]) -> None:
    """The service's vectors are those of the bulk command, where that has run; images and texts share a space."""
    wanted = [CAPTIONS[0], CAPTIONS[2]]
    answered = post({"input": wanted, "encoding_format": "float"})["data"]
    vectors = np.array([one["embedding"] for one in answered])
    image = np.array(post({"input": picture(0), "encoding_format": "float"})["data"][0]["embedding"])
    assert vectors.shape == (2, *image.shape) and np.isfinite(image).all()
    if (home / "vectors" / method).exists():
        bulk = {row["text"]: row["embedding"] for row in texts_of(home / "vectors" / method)}
        np.testing.assert_allclose(vectors, [bulk[text] for text in wanted], atol=1e-4)
