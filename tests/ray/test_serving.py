"""The service on a real Ray Serve, asked by the stock OpenAI client."""

from __future__ import annotations

import base64
import io
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from isthmus.config import ServeConfig
from isthmus.data.transforms import ImageTransform
from isthmus.errors import IsthmusError

pytestmark = pytest.mark.ray
TOKEN = "a-token-of-some-length"  # not a secret: the tests' own


class Colours(nn.Module):
    """Names the colour channel that prevails. The prompt ``hold PATH`` makes it wait until that file exists."""

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        time.sleep(0.05)
        return pixels_BCHW.mean((2, 3))[:, None]

    def generate(self, features_BND: Tensor, *, prompt: str | None, max_new_tokens: int = 30, **_: Any) -> list[str]:
        prompt = prompt or ""
        if prompt.startswith("hold "):
            held = Path(prompt.removeprefix("hold "))
            while not held.exists():
                time.sleep(0.02)
            prompt = ""
        names = [("red", "green", "blue")[i] for i in features_BND[:, 0].argmax(-1)]
        return [" ".join(f"{prompt} a {name} square".split()[:max_new_tokens]) for name in names]

    def embed_images(self, features_BND: Tensor) -> Tensor:
        return nn.functional.normalize(features_BND - features_BND.min(), dim=-1).repeat(1, 2, 1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        rows = [[float(name in text) for name in ("red", "green", "blue")] for text in texts]
        return nn.functional.normalize(torch.tensor(rows), dim=-1)


class Retriever(nn.Module):
    """Has no Captions."""

    encode_images = Colours.encode_images
    embed_images = Colours.embed_images
    embed_texts = Colours.embed_texts


def load(model: str, tracking: object, device: str) -> Any:
    from isthmus.serving.replica import LoadedModel

    name = model.split("/")[1]
    if name == "broken":
        raise IsthmusError("The model 'broken' is broken.", "Take another.")
    kinds = {"colours": Colours, "retriever": Retriever}
    return LoadedModel(kinds[name]().eval(), ImageTransform(8, (0.0,) * 3, (1.0,) * 3), model, device)


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "PNG")
    return out.getvalue()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


RED, GREEN = data_url(png((250, 10, 10))), data_url(png((10, 250, 10)))


def bomb() -> str:
    """A PNG of a few hundred bytes whose header names 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (30_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    return data_url(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def question(url: str, **more: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {"model": "colours", "messages": [{"role": "user", "content": content}], **more}


@pytest.fixture(scope="module", autouse=True)
def _importable(ray_cluster: Any) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    from isthmus.serving.app import serve, shutdown

    config = ServeConfig(
        models={"colours": "models:/colours/1", "retriever": "models:/retriever/1"},
        port=0,
        max_batch=4,
        max_ongoing=4,
        max_queued=4,
        batch_wait_ms=200,
        max_body_mb=0.25,
        cpus_per_replica=0.5,
        timeout_s=60,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_API_KEY", TOKEN)
        url = serve(config, block=False, load=load)
    yield url
    shutdown()


@pytest.fixture(scope="module")
def client(service: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service}/v1", api_key=TOKEN, max_retries=0, timeout=30)


def post(service: str, body: Any, token: str = TOKEN, route: str = "chat/completions") -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.post(f"{service}/v1/{route}", json=body, headers=headers, timeout=30)


def test_a_model_that_cannot_load_is_named_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve as ray_serve

    from isthmus.serving.app import serve

    monkeypatch.setenv("ISTHMUS_API_KEY", TOKEN)
    with pytest.raises(IsthmusError, match="The model 'broken' is broken"):
        serve(ServeConfig(models={"x": "models:/broken/1"}, port=0), block=False, load=load)
    assert ray_serve.status().applications == {}


def test_the_openai_client_gets_captions(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**question(RED))
    assert answer.choices[0].message.content == "a red square"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 3
    short = client.chat.completions.create(**question(GREEN, max_tokens=2))
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("a green", "length")


def test_the_openai_client_reads_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**question(RED, stream=True, stream_options={"include_usage": True}))
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "a red square"
    assert chunks[-1].usage.total_tokens == 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_the_openai_client_gets_embeddings_and_models(client: openai.OpenAI) -> None:
    texts = client.embeddings.create(model="retriever", input=["a red car", "green grass"])  # base64 on the wire
    image = client.embeddings.create(model="retriever", input=RED, encoding_format="float")
    similarity = np.array([row.embedding for row in texts.data]) @ np.array(image.data[0].embedding)
    assert similarity[0] > 0.9 > similarity[1]
    assert {model.id for model in client.models.list()} == {"colours", "retriever"}
    assert client.models.retrieve("retriever").capabilities == ["embed-images", "embed-texts"]


def test_a_model_without_captions_says_what_it_can_do(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="embed-images, embed-texts"):
        client.chat.completions.create(**question(RED) | {"model": "retriever"})


def test_a_wrong_token_is_refused(service: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{service}/v1/models").json()["error"]["code"] == "invalid_api_key"


def test_an_oversized_body_is_refused(service: str) -> None:
    answer = post(service, question("data:image/png;base64," + "A" * 300_000))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_decompression_bomb_is_refused(service: str) -> None:
    answer = post(service, question(bomb()))
    assert answer.status_code == 400
    assert "larger than the limit" in answer.json()["error"]["message"]


def test_requests_that_come_together_share_a_forward_pass(service: str) -> None:
    for _ in range(20):  # whether they meet is up to the scheduler, so they are given several chances
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda url: post(service, question(url)), [GREEN, RED, GREEN, RED]))
        said = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
        assert said == ["a green square", "a red square"] * 2
        if max(int(answer.headers["x-isthmus-batch-size"]) for answer in answers) > 1:
            return
    pytest.fail("no two of 80 requests shared a forward pass")


def test_a_full_queue_answers_503(service: str, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    body = question(RED)
    body["messages"][0]["content"].append({"type": "text", "text": f"hold {gate}"})
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(post, service, body) for _ in range(16)]  # 4 are worked on, 4 wait
        try:
            refused = next(as_completed(asked)).result()
        finally:
            gate.touch()
        answers = [future.result() for future in asked]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert {answer.status_code for answer in answers} == {200, 503}


def test_health_page_and_request_id_need_no_token(service: str) -> None:
    assert httpx.get(f"{service}/health", timeout=30).json()["status"] == "ok"
    page = httpx.get(service, headers={"X-Request-ID": "mine-1"})
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers.get_list("x-request-id") == ["mine-1"]


def test_a_running_service_keeps_its_one_address(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.serving.app import serve

    monkeypatch.setenv("ISTHMUS_API_KEY", TOKEN)
    with pytest.raises(IsthmusError, match="already runs in this cluster"):
        serve(ServeConfig(models={"colours": "models:/colours/1"}, port=1), block=False, load=load)
