"""Sounds and clips over HTTP: what is let in, what is decoded, and how it is refused."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest

from heard_cases import heard_recipe
from isthmus.config import ServeConfig
from isthmus.data.media import Limits
from isthmus.serving.answers import Refusal
from isthmus.serving.media import Medium, read_medium
from isthmus.serving.problems import ApiError
from isthmus.serving.replica import LoadedModel, ModelReplica, _decode_medium, capabilities
from isthmus.serving.schema import EmbeddingRequest, embedding_items
from isthmus.testing.clips import clip_bytes, sound_bytes
from method_cases import build, recipe


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def items(*given: Any) -> list[Any]:
    return embedding_items(EmbeddingRequest(model="m", input=list(given)))


def test_sounds_and_clips_are_read_from_data_urls() -> None:
    sound, clip = sound_bytes(), clip_bytes()
    found = items({"audio": data_url(sound, "audio/wav")}, data_url(clip, "video/mp4"), "a text")
    assert found == [Medium("audio", sound), Medium("video", clip), "a text"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"audio": "https://example.org/a.wav"}, "no data: URL of type audio/"),
        ({"audio": data_url(b"#EXTM3U\nfile:///etc/passwd", "audio/wav")}, "is not WAV, Ogg, FLAC or MP3"),
        ({"audio": data_url(clip_bytes(), "audio/wav")}, "is not WAV, Ogg, FLAC or MP3"),
        ({"video": data_url(sound_bytes(), "video/mp4")}, "is not MP4, WebM or Matroska"),
        ({"audio": "data:audio/wav,plain"}, "not base64"),
        ({"audio": "data:audio/wav;base64,@@@@"}, "base64 text is broken"),
        ({"sound": "x"}, '"audio": "data:audio/wav'),
    ],
)
def test_what_is_no_sound_or_clip_is_refused_at_the_door(given: dict[str, str], said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        items(given)
    assert caught.value.status == 400


def test_limits_of_the_service_reach_the_decoder() -> None:
    transform = build(heard_recipe("video-audio")).transform
    sound = read_medium(data_url(sound_bytes(), "audio/wav"), "audio", "input")
    clip = read_medium(data_url(clip_bytes(), "video/mp4"), "video", "input")
    assert _decode_medium(sound, transform, Limits())["audio_NF"].shape == (32, 256)  # type: ignore[index]
    assert _decode_medium(clip, transform, Limits())["pixels"].shape == (3, 3, 32, 32)  # type: ignore[index]
    for medium, limits in ((sound, Limits(seconds=0.5)), (clip, Limits(pixels=100)), (clip, Limits(bytes=100))):
        refusal = _decode_medium(medium, transform, limits)
        assert isinstance(refusal, Refusal) and "limit of" in refusal.message
    assert ServeConfig(models={"m": "x"}).max_seconds == 60


def replica_of(modality: str) -> Any:
    stage = build(heard_recipe(modality), with_vision=True)
    replica: Any = object.__new__(ModelReplica)  # without a deployment around it
    replica._name, replica._loaded = "m", LoadedModel(stage.module.eval(), stage.transform, "v")
    replica._able = capabilities(stage.module, stage.transform)
    return replica


def test_each_model_says_what_it_takes(tmp_path: Any) -> None:
    clips, images = replica_of("video-audio"), replica_of("image-audio")
    assert clips._able == ("embed-clips", "embed-sounds") and images._able == ("embed-images", "embed-sounds")
    texts = build(recipe("projector", tmp_path), with_vision=True)
    assert capabilities(texts.module, texts.transform) == ("embed-images", "embed-texts")
    for replica, item in ((clips, "a text"), (clips, b"image"), (images, Medium("video", b""))):
        answer = asyncio.run(replica._embed(item))
        assert isinstance(answer, Refusal) and answer.code == "unsupported_capability"
        assert "Its capabilities: embed-" in answer.message
    refused = asyncio.run(replica_of("video-audio").caption(b"", "", 5))
    assert refused.message == "The model 'm' cannot caption images. Its capabilities: embed-clips, embed-sounds."


def test_vectors_of_sounds_and_clips_are_of_one_length() -> None:
    replica = replica_of("video-audio")
    transform = replica._loaded.transform
    heard = replica._embed_sounds([transform.listen(sound_bytes(hertz=h)) for h in (300, 900)])
    seen = replica._embed_images([transform.seen(clip_bytes(seed=n), "mp4") for n in range(2)])
    assert [len(v.values) for v in (*heard, *seen)] == [16] * 4
    assert all(np.linalg.norm(v.values) == pytest.approx(1, abs=1e-5) for v in (*heard, *seen))
    assert np.abs(heard[0].values - heard[1].values).max() > 1e-3
