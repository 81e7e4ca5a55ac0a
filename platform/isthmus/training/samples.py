"""A contact sheet at the end of a run: some pairs of the last batch, and what the model makes of their images.

The last batch is a function of the recipe, so a run that was resumed shows the pairs that an undisturbed one would.
"""

from __future__ import annotations

import contextlib
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from isthmus.contracts import Answers, Batch, Captions, Embeds, Sees, Stage, StageModule
from isthmus.data.clips import image_transform
from isthmus.errors import IsthmusError

SIDE, WIDTH, MARGIN, LINE = 160, 720, 12, 18
TEXT_SIZE, LETTERS, NEW_TOKENS = 14, 72, 20


@dataclass(frozen=True)
class Pair:
    """One line of the sheet.

    Attributes:
        id: the sample's.
        caption: that it was trained with in this epoch.
        own: what the model says, by the way in which it does: ``generated``, or ``matched`` for the nearest of all
            captions of the batch.
    """

    id: int
    caption: str
    own: dict[str, str] = field(default_factory=dict)


def contact_sheet(
    stage: Stage, batch: Batch, count: int, *, data: str | None, autocast: str | None, whole: bool
) -> dict[str, bytes]:
    """A PNG and the same as JSON, by the end of their names. Call it on one rank, behind the last step.

    Args:
        batch: this rank's last. count: pairs at most.
        data: URL of the data set, for images that the batch holds as features only; without it they are not shown.
        autocast: type of device to compute on in bf16, or None.
        whole: whether parameters are whole; where they are partitioned (ZeRO 3) the model is not asked.
    """
    rows = batch.valid_B.nonzero().flatten()[:count].cpu()
    captions = _texts(batch)
    own: dict[str, list[str]] = {}
    if whole and len(rows):
        module = stage.module.eval()
        asked = [captions[row] for row in rows.tolist()] if captions else []
        with torch.no_grad(), torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
            own = own_captions(module, _features(module, batch, rows), captions, asked)
    pairs = [
        Pair(
            int(batch.sample_ids_B[row]),
            captions[row] if captions else "",
            {how: said[number] for how, said in own.items()},
        )
        for number, row in enumerate(rows.tolist())
    ]
    images = _seen(stage, batch, rows) if batch.pixels_BCHW is not None else _stored(data, [pair.id for pair in pairs])
    listed = json.dumps([asdict(pair) for pair in pairs], indent=1, ensure_ascii=False)
    return {"png": draw(pairs, images), "json": listed.encode()}


def own_captions(
    module: StageModule, features_BND: Tensor | None, texts: Sequence[str], asked: Sequence[str] = ()
) -> dict[str, list[str]]:
    """What a model says of images, in each of the ways that it has.

    Args:
        features_BND: frozen image tokens; without them it is not asked.
        texts: to choose from.
        asked: each image's own text, which a model that answers takes as a question.
    """
    if features_BND is None:
        return {}
    found: dict[str, list[str]] = {}
    if isinstance(module, Captions):
        with contextlib.suppress(IsthmusError):  # trained without the loss that teaches it to
            found["generated"] = module.generate(features_BND, max_new_tokens=NEW_TOKENS)
    if isinstance(module, Embeds) and texts:
        images_BQE, texts_KE = module.embed_images(features_BND), module.embed_texts(list(texts))
        nearest_B = torch.einsum("bqe,ke->bqk", images_BQE, texts_KE).amax(1).argmax(1)
        found["matched"] = [texts[number] for number in nearest_B.tolist()]
    if isinstance(module, Answers) and asked:
        found["answered"] = module.answer(features_BND, list(asked))
    return found


def draw(pairs: Sequence[Pair], images: Sequence[Image.Image | None]) -> bytes:
    """The sheet as PNG. Its font has Latin letters only; the JSON beside it has all."""
    sheet = Image.new("RGB", (WIDTH, MARGIN + max(1, len(pairs)) * (SIDE + MARGIN)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_SIZE)
    for number, (pair, image) in enumerate(zip(pairs, images, strict=True)):
        top = MARGIN + number * (SIDE + MARGIN)
        if image is not None:
            sheet.paste(image.resize((SIDE, SIDE)), (MARGIN, top))
        lines = [
            line
            for how, text in {"trained with": pair.caption, **pair.own}.items()
            for line in textwrap.wrap(f"{how}: {text}", LETTERS)
        ]
        for place, line in enumerate(lines[: SIDE // LINE]):
            pen.text((2 * MARGIN + SIDE, top + place * LINE), line, "black", font=font)
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _texts(batch: Batch) -> tuple[str, ...]:
    """The captions of the batch; a method that keeps no text has them as tokens alone, of which nothing is shown."""
    return batch.texts if len(batch.texts) == len(batch) else ()


def _features(module: StageModule, batch: Batch, rows: Tensor) -> Tensor | None:
    if batch.features_BND is not None:
        return batch.features_BND[rows]
    if batch.pixels_BCHW is None or not isinstance(module, Sees):
        return None
    return module.encode_images(batch.pixels_BCHW[rows])


def _seen(stage: Stage, batch: Batch, rows: Tensor) -> list[Image.Image | None]:
    """Images as the model was trained on them, crop and flip included."""
    assert batch.pixels_BCHW is not None
    pixels_BCHW = batch.pixels_BCHW[rows] if batch.pixels_BCHW.ndim == 4 else batch.pixels_BCHW[rows, 0]
    pixels_BHWC = pixels_BCHW.float().cpu().permute(0, 2, 3, 1).numpy()
    transform = image_transform(stage.transform)
    mean, std = getattr(transform, "mean", None), getattr(transform, "std", None)
    if mean is not None and std is not None:
        pixels_BHWC = pixels_BHWC * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return [Image.fromarray((image.clip(0.0, 1.0) * 255.0).astype(np.uint8)) for image in pixels_BHWC]


def _stored(data: str | None, ids: Sequence[int]) -> list[Image.Image | None]:
    """Images as they are stored; None for one that cannot be read now."""
    if data is None:
        return [None] * len(ids)
    from isthmus.data.clips import picture_of
    from isthmus.data.manifest import Manifest
    from isthmus.data.readers import RawSample, read_rows
    from isthmus.data.transforms import DecodeError

    manifest = Manifest.load(data, verify=False)
    place = {int(sample): row for row, sample in enumerate(manifest.ids)}
    found: list[Image.Image | None] = []
    for raw in read_rows(manifest, [place[sample] for sample in ids]):
        try:
            found.append(picture_of(raw, at_least=SIDE) if isinstance(raw, RawSample) else None)
        except DecodeError:
            found.append(None)
    return found
