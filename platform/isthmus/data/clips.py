"""What is seen and what is heard, as a model takes them: frames of a clip or one image, and patches of its sound.

Shape letters: T frames, C channels (3), N patches of a sound, P values of a patch (256).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from isthmus.data.media import LIMITS, Limits, read_frames, read_sound
from isthmus.data.readers import RawSample
from isthmus.data.records import VIDEO_KINDS
from isthmus.data.spectrum import RATE, ROWS, columns_of, patches
from isthmus.data.transforms import DecodeError, ImageTransform, decode_image

Modality = Literal["video-audio", "image-audio"]


@dataclass(frozen=True)
class ClipTransform:
    """A stored sample to arrays. Picklable; a function of (sample, seed) alone.

    Frames are taken in the middle of T equal parts of the clip (of its first ``seconds``, where it is longer); drawn,
    anywhere in each part. All frames of a clip are cropped and mirrored alike. The sound is taken from the start, and
    what it lacks of ``seconds`` is masked. It is the sound file of the sample, else the clip's own track.

    Attributes:
        image: size, crop and normalisation of a frame.
        modality: ``image-audio`` takes an image in place of a clip: one frame.
        frames: T.
        seconds: of the sound and of the clip.
        drawn: whether times and crops are drawn, by the seed that is given.
        sees, hears: which of the two :meth:`arrays` reads; a sample may lack the other.
    """

    image: ImageTransform
    modality: Modality = "video-audio"
    frames: int = 8
    seconds: float = 10.0
    drawn: bool = False
    sees: bool = True
    hears: bool = True

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.image.size

    @property
    def augmenting(self) -> ClipTransform:
        """The same for training."""
        return replace(self, drawn=True)

    @property
    def sound_shape(self) -> tuple[int, int]:
        """(N, P) of a sound."""
        return columns_of(self.seconds) * ROWS, 256

    @property
    def seen_shape(self) -> tuple[int, ...]:
        """Of ``pixels_CHW``: [T, 3, H, W], and [3, H, W] of an image."""
        one = (3, self.size, self.size)
        return (self.frames, *one) if self.modality == "video-audio" else one

    def arrays(self, raw: RawSample, seed: int = 0) -> dict[str, Any]:
        """Members of a :class:`isthmus.contracts.Sample`.

        Raises:
            DecodeError: what is seen or what is heard is not there, above a limit or damaged.
        """
        found: dict[str, Any] = {"pixels_CHW": self.seen(raw.image, raw.kind, seed)} if self.sees else {}
        return found | (self.heard(raw.image, raw.kind, raw.sound) if self.hears else {})

    def seen(self, data: bytes, kind: str, seed: int = 0, limits: Limits = LIMITS) -> np.ndarray:
        """float32 [T, 3, H, W] of a clip, [3, H, W] of an image."""
        is_clip = kind in VIDEO_KINDS
        if is_clip != (self.modality == "video-audio"):
            raise DecodeError(
                f"the sample has {'a clip' if is_clip else 'an image'}, which {self.modality} does not take"
            )
        random = np.random.Generator(np.random.Philox(seed & ((1 << 64) - 1))) if self.drawn else None
        if is_clip:
            images, _ = read_frames(data, lambda seconds: self._times(seconds, random), limits=limits)
        else:
            images = [decode_image(data, at_least=self.image.least_side)]
        crop = self.image.draw(images[0].size, seed) if random is not None else None
        out_TCHW = np.empty((len(images), 3, self.size, self.size), np.float32)
        for image, out_CHW in zip(images, out_TCHW, strict=True):
            pixels_HWC = self.image.resized(image, crop.box if crop else None)
            self.image.normalised(crop.finish(pixels_HWC) if crop else pixels_HWC, out_CHW)
        return out_TCHW if is_clip else out_TCHW[0]

    def heard(self, data: bytes, kind: str, sound: bytes | None, limits: Limits = LIMITS) -> dict[str, np.ndarray]:
        """``audio_NF`` float32 [N, 256] and ``audio_mask_N`` bool of a sample's sound file or its clip's track."""
        if sound is None and kind not in VIDEO_KINDS:
            raise DecodeError("the sample has no sound (.wav, .ogg, .flac, .mp3)")
        given, what = (data, "clip") if sound is None else (sound, "sound")
        return self.listen(given, what, limits)

    def listen(self, data: bytes, what: str = "sound", limits: Limits = LIMITS) -> dict[str, np.ndarray]:
        """The same of an encoded sound alone."""
        sound_S = read_sound(data, RATE, what=what, seconds=self.seconds, limits=limits)
        found = patches(sound_S, columns_of(self.seconds))
        return {"audio_NF": found.values_NP, "audio_mask_N": found.mask_N}

    @property
    def digest(self) -> str:
        """sha256 of what decides the arrays; not which of them are read."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("sees", "hears")}
        facts["image"] = self.image.facts
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _times(self, seconds: float, random: np.random.Generator | None) -> list[float]:
        part = min(seconds, self.seconds) / self.frames
        within = random.random(self.frames) if random is not None else np.full(self.frames, 0.5)
        return [float((number + share) * part) for number, share in enumerate(within)]


def clip_transform(transform: Any) -> ClipTransform | None:
    """``transform`` where it takes clips and sounds; None where it takes images alone."""
    return transform if isinstance(transform, ClipTransform) else None


def image_transform(transform: Any) -> Any:
    """That of a single image or frame: a clip's, or ``transform`` itself."""
    return transform.image if isinstance(transform, ClipTransform) else transform


def picture_of(raw: RawSample, at_least: int | None = None) -> Image.Image:
    """An RGB image to show of a stored sample: its image, or the frame in the middle of its clip.

    Raises:
        DecodeError: there is none to be had.
    """
    if raw.kind in VIDEO_KINDS:
        return read_frames(raw.image, lambda seconds: [seconds / 2])[0][0]
    return decode_image(raw.image, at_least=at_least)


def faults_of(raw: RawSample) -> list[str]:
    """What is wrong with a stored sample's clip or image and its sound, all of it decoded; "" is never among them."""
    found: list[str] = []

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except DecodeError as error:
            found.append(error.reason)
            return None

    is_clip = raw.kind in VIDEO_KINDS
    if is_clip:
        attempt(lambda: read_frames(raw.image, lambda seconds: [seconds]))
    else:
        attempt(lambda: decode_image(raw.image))
    if raw.sound is not None or (is_clip and not found):
        data, what = (raw.image, "clip") if raw.sound is None else (raw.sound, "sound")
        heard = attempt(lambda: read_sound(data, RATE, what=what))
        if heard is not None and not np.abs(heard).max() > 0:
            found.append(f"the {what} is silent throughout")
    return found
