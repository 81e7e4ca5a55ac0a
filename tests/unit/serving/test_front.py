"""The HTTP front, in-process, over a model that needs no Ray."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from isthmus.serving.answers import Caption, Card, Refusal, Vector
from isthmus.serving.openai import FrontSettings, create_front
from isthmus.serving.problems import overloaded

TOKEN = "correct horse battery"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
AUTH = {"Authorization": f"Bearer {TOKEN}"}


class FakeModel:
    """Answers what it was asked, so that a test sees what reached it."""

    def __init__(self) -> None:
        self.fault: BaseException | None = None
        self.hang = False

    async def _maybe(self) -> None:
        if self.fault is not None:
            raise self.fault
        if self.hang:
            await asyncio.sleep(3600)

    async def card(self) -> Card:
        await self._maybe()
        return Card(("caption-images", "embed-texts"), "models:/fake/1", 7)

    async def caption(self, image: bytes, prompt: str, max_new_tokens: int) -> Caption | Refusal:
        await self._maybe()
        return Caption(f"{len(image)}|{prompt}|{max_new_tokens}", 2, 3, max_new_tokens == 1, 1)

    async def embed(self, items: list[str | bytes]) -> list[Vector | Refusal]:
        await self._maybe()
        return [
            Vector(np.array([0.6, 0.8], np.float32), 2) if isinstance(i, str) else Refusal("no images", "nope")
            for i in items
        ]


class Seen:
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int]] = []

    def request(self, route: str, model: str, status: int, seconds: float) -> None:
        self.rows.append((route, model, status))


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def seen() -> Seen:
    return Seen()


def make(model: FakeModel, seen: Seen | None = None, **changes: Any) -> TestClient:
    values = {
        "token": hashlib.sha256(TOKEN.encode()).digest(),
        "max_in_flight": 4,
        "max_body_bytes": 4000,
        "timeout_s": 5.0,
        "max_new_tokens": 16,
    } | changes
    front = create_front(FrontSettings(**values), {"fake": model}, seen)
    return TestClient(front, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def client(model: FakeModel, seen: Seen) -> TestClient:
    client = make(model, seen)
    client.headers.update(AUTH)
    return client


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    content = list(parts) or [{"type": "image_url", "image_url": {"url": URL}}]
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **more}


def fault(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return answer.json()["error"]


def test_text_parts_become_the_prompt(client: TestClient, seen: Seen) -> None:
    body = chat({"type": "text", "text": "a photo"}, {"type": "image_url", "image_url": {"url": URL, "detail": "low"}})
    body["messages"].insert(0, {"role": "system", "content": "be brief"})
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == f"{len(PNG)}|be brief\na photo|16"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert answer["id"].startswith("chatcmpl-")
    assert seen.rows == [("chat", "fake", 200)]


@pytest.mark.parametrize(
    ("asked", "given"), [({"max_tokens": 5}, 5), ({"max_tokens": 999}, 16), ({"max_completion_tokens": 1}, 1)]
)
def test_the_token_budget_is_capped(client: TestClient, asked: dict[str, int], given: int) -> None:
    choice = client.post("/v1/chat/completions", json=chat(**asked)).json()["choices"][0]
    assert choice["message"]["content"].endswith(f"|{given}")
    assert choice["finish_reason"] == ("length" if given == 1 else "stop")


def test_a_stream_ends_as_the_protocol_says(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=chat(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"n": 2}, "n"),
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: TestClient, change: dict[str, Any], param: str) -> None:
    error = fault(client.post("/v1/chat/completions", json=chat() | change), 400)
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize("value", [{"temperature": 0}, {"n": 1}, {"response_format": {"type": "text"}}, {"seed": 3}])
def test_harmless_values_pass(client: TestClient, value: dict[str, Any]) -> None:
    assert client.post("/v1/chat/completions", json=chat(**value)).status_code == 200


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.org/cat.png", "image_url_not_supported"),
        ("file:///etc/passwd", "image_url_not_supported"),
        ("data:image/svg+xml;base64,AAAA", "unsupported_image"),
        ("data:image/png,AAAA", "invalid_image"),
        ("data:image/png;base64,@@@", "invalid_image"),
        ("data:image/png;base64," + base64.b64encode(b"%!PS-Adobe").decode(), "unsupported_image"),
    ],
)
def test_only_inline_images_of_known_formats(client: TestClient, url: str, code: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    error = fault(client.post("/v1/chat/completions", json=chat(part)), 400)
    assert (error["code"], error["param"]) == (code, "messages.0.content.0.image_url.url")


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_image(client: TestClient, count: int) -> None:
    parts = [{"type": "text", "text": "hello"}, *[{"type": "image_url", "image_url": {"url": URL}}] * count]
    assert f"{count} images" in fault(client.post("/v1/chat/completions", json=chat(*parts)), 400)["message"]


def test_embeddings_in_both_encodings(client: TestClient) -> None:
    body = {"model": "fake", "input": ["a", {"text": "b"}]}
    plain = client.post("/v1/embeddings", json=body).json()
    assert [row["index"] for row in plain["data"]] == [0, 1]
    assert plain["usage"]["total_tokens"] == 4
    alone = client.post("/v1/embeddings", json=body | {"input": {"text": "b"}}).json()["data"]  # one need not be a list
    assert [row["embedding"] for row in alone] == [plain["data"][1]["embedding"]]
    packed = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), plain["data"][0]["embedding"])


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "input"),
        ("", "input"),
        ([[1, 2]], "input.0"),
        (["a", {"image": "x"}], "input.1.image"),
        ({"image": "x"}, "input.image"),
        (["a", URL], "input.1"),
        (["a"] * 257, "input"),
    ],
)
def test_unusable_embedding_inputs_are_named(client: TestClient, given: Any, param: str) -> None:
    assert fault(client.post("/v1/embeddings", json={"model": "fake", "input": given}), 400)["param"] == param


def test_unknown_models_routes_and_methods(client: TestClient) -> None:
    error = fault(client.post("/v1/chat/completions", json=chat() | {"model": "fak"}), 404)
    assert error["code"] == "model_not_found"
    assert "'fake'" in error["message"]
    assert fault(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    assert fault(client.get("/v1/embeddings"), 405)["code"] == "method_not_allowed"
    assert fault(client.get("/docs"), 404)


def test_bodies_that_are_no_requests(client: TestClient) -> None:
    json_type = {"Content-Type": "application/json"}
    assert fault(client.post("/v1/embeddings", content="{", headers=json_type), 400)["code"] == "invalid_json"
    assert fault(client.post("/v1/embeddings", content="[" * 3000, headers=json_type), 400)
    assert fault(client.post("/v1/embeddings", content="[1]", headers=json_type), 400)
    assert fault(client.post("/v1/embeddings", content="{}", headers={"Content-Type": "text/plain"}), 415)


def test_a_body_without_announced_length_is_cut_off_while_it_arrives(client: TestClient) -> None:
    sent = 0

    def pieces() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    assert fault(client.post("/v1/embeddings", content=pieces(), headers=headers), 413)["code"] == "request_too_large"


def test_faults_of_the_model_become_their_status(client: TestClient, model: FakeModel, seen: Seen) -> None:
    model.fault = overloaded(3)
    busy = client.post("/v1/chat/completions", json=chat())
    assert (fault(busy, 503)["code"], busy.headers["retry-after"]) == ("overloaded", "3")
    model.fault = RuntimeError("secret path /somewhere")
    broken = client.post("/v1/chat/completions", json=chat())
    assert "secret" not in broken.text
    assert broken.headers["x-request-id"] in fault(broken, 500)["message"]
    assert [row[2] for row in seen.rows] == [503, 500]


def test_a_model_that_hangs_is_a_504(model: FakeModel) -> None:
    model.hang = True
    client = make(model, timeout_s=0.05)
    assert fault(client.post("/v1/chat/completions", json=chat(), headers=AUTH), 504)["code"] == "timeout"


def test_requests_beyond_the_limit_are_refused_before_their_body_is_read(model: FakeModel) -> None:
    client = make(model, max_in_flight=0)
    answer = client.post("/v1/chat/completions", json=chat(), headers=AUTH)
    assert fault(answer, 503)["code"] == "overloaded"
    assert client.get("/v1/models", headers=AUTH).status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer ", "Bearer ä"])
def test_without_the_token_nothing_is_told(model: FakeModel, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("utf-8")}
    client = make(model)
    for path in ("/v1/models", "/nothing"):
        answer = client.get(path, headers=headers)
        assert fault(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.post("/health", headers=headers).status_code == 401


def test_without_authentication_only_loopback_names_are_answered(model: FakeModel) -> None:
    client = make(model, token=None)
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    assert fault(client.get("/v1/models", headers={"Host": "evil.example"}), 403)["code"] == "host_not_allowed"


def test_health_follows_the_models(model: FakeModel, client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", "models": ["fake"], "waiting_for": []}
    model.fault = overloaded()
    assert client.get("/health").status_code == 200  # busy, and there


def test_health_waits_for_a_model(model: FakeModel, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.serving.openai.HEALTH_SECONDS", 0.02)
    model.hang = True
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["waiting_for"]) == (503, ["fake"])


def test_the_page_allows_its_own_script_and_nothing_else(model: FakeModel) -> None:
    answer = make(model).get("/")
    policy = answer.headers["content-security-policy"]
    script = answer.text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "http://" not in answer.text and "https://" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_request_id_is_made_where_none_came(client: TestClient) -> None:
    assert len(client.get("/health").headers["x-request-id"]) == 32
