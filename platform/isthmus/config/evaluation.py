"""The sections of an evaluation's recipe."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from isthmus.config.base import Config
from isthmus.config.fields import MaybeOutput, MaybeSource, Positive, Source
from isthmus.config.run import TrackingConfig

Task = Literal["retrieval", "captioning", "vqa", "classification", "matching", "correspondence"]


class LayoutConfig(Config):
    """A data set as its authors publish it; nothing has to be indexed.

    ``coco``: COCO captions JSON. ``karpathy``: dataset_coco.json, dataset_flickr30k.json. ``vqav2``: a questions and
    an annotations JSON. ``flickr30k``: results_20130124.token, or the table (CSV) that circulates. ``classes``: one
    folder of images per class.
    """

    kind: Literal["coco", "karpathy", "vqav2", "flickr30k", "classes"]
    images: Source = Field(description="folder or URL below which the image files lie")
    annotations: MaybeSource = Field(None, description="captions, or the answers of vqav2; not for classes")
    questions: MaybeSource = Field(None, description="vqav2: the questions")
    training: MaybeSource = Field(
        None, description="vqav2: annotations of the training questions, whose answers make the prior-only baseline"
    )
    split: str | None = Field(
        None, description="karpathy and tables with a split column: which, e.g. test or train+restval; else its name"
    )
    members: MaybeSource = Field(
        None, description="flickr30k: a text file with an image name a line, that is the split"
    )
    image_name: str | None = Field(
        None,
        description="vqav2: file name of an image id, e.g. COCO_val2014_{:012d}.jpg; made of data_subtype if not given",
    )
    class_names: MaybeSource = Field(None, description="classes: a JSON object of folder name -> class name")

    @field_validator("image_name")
    @classmethod
    def _one_place_for_the_id(cls, value: str | None) -> str | None:
        if value is not None and len(re.findall(r"\{(?::0?\d*d)?\}", value)) != 1:
            raise ValueError("expected one place for the id, such as {} or {:012d}")
        return value

    @model_validator(mode="after")
    def _files_are_named(self) -> LayoutConfig:
        if self.kind == "vqav2" and not self.questions:
            raise ValueError("layout vqav2 needs 'questions', the URL of the questions JSON")
        if self.kind in ("coco", "karpathy", "flickr30k") and not self.annotations:
            raise ValueError(f"layout {self.kind} needs 'annotations', the URL of its captions")
        if self.kind == "karpathy" and not self.split:
            raise ValueError("layout karpathy needs 'split', such as test")
        return self


class VqaConfig(Config):
    """How questions are asked. The defaults are BLIP-2's for FlanT5; the paper asks OPT "Question: {} Answer:"."""

    prompt: str = Field("Question: {} Short answer:", description="{} is where the question goes")
    clean: bool = Field(True, description='questions in lower case, without .!"()*#:;~, at most 50 words, as LAVIS')
    num_beams: Positive = 5
    max_new_tokens: Positive = 10
    min_new_tokens: Annotated[int, Field(ge=0)] = 1
    length_penalty: float = Field(-1.0, description="below 0 favours short answers; without effect on one beam")

    @field_validator("prompt")
    @classmethod
    def _one_place_for_the_question(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError("expected exactly one {}, where the question goes")
        return value


class ClassificationConfig(Config):
    """Zero-shot classification by an ensemble of prompts."""

    templates: tuple[str, ...] = Field(
        (
            "a photo of a {}.",
            "a blurry photo of a {}.",
            "a photo of many {}.",
            "a photo of the large {}.",
            "a photo of the small {}.",
            "a drawing of a {}.",
            "a picture of a {}.",
        ),
        min_length=1,
        description="{} is where the class name goes; their vectors are averaged",
    )
    class_names: MaybeSource = Field(
        None,
        description="names of an indexed set's labels, all of them classes: a JSON object of label -> name, or a list, "
        "a JSON one or a name a line, whose labels are the numbers from 0",
    )

    @field_validator("templates")
    @classmethod
    def _one_place_for_the_class(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"expected exactly one {{}} in '{template}', where the class name goes")
        return value


class MatchingConfig(Config):
    """Which wrong captions image-text matching is tried on."""

    negatives: Literal["auto", "given", "mined"] = Field(
        "auto",
        description="given: the data's own 'negatives'; mined: the wrong caption that ITC ranks highest for the image; "
        "auto: given where the data has them",
    )


class CorrespondenceConfig(Config):
    """Whether a sound belongs to what is seen, as a binary question."""

    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="share of the pairs on which the threshold is chosen; accuracy is that of the others"
    )


class EvaluateConfig(Config):
    """Held-out figures of one registered model."""

    model: Source = Field(description="models:/NAME@ALIAS or a folder")
    data: MaybeSource = Field(None, description="URL of an indexed data set")
    layout: LayoutConfig | None = Field(None, description="a data set in a published layout, instead of 'data'")
    cache: MaybeSource = None
    tasks: tuple[Task, ...] = ("retrieval",)
    captions: MaybeSource = Field(None, description="score these bulk captions instead of generating")
    rerank: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0,
        description="re-rank the best k by ITM; 0 is off, LAVIS takes 128; all: every pair, for small sets and for "
        "models that have no contrast",
    )
    limit: Positive | None = None
    batch: Positive = 64
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Ray actors that encode and generate; 0 does it in this process"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    captions_per_image: Literal["first", "all"] | Positive = Field(
        "first",
        description="retrieval: which captions of an image take part, 5 for the first five; they are its positives",
    )
    text_max_length: Positive | None = Field(
        None, description="retrieval, matching, classification: tokens kept of a text; LAVIS retrieves with 35, the "
        "recipe's own length if not given"
    )  # fmt: skip
    prompt: str | None = Field(
        None,
        description="captioning: text between the soft prompt and the caption, '' for none; the recipe's own if not "
        "given",
    )
    max_new_tokens: Positive = 20
    min_new_tokens: Annotated[int, Field(ge=0)] = 1
    num_beams: Positive = 1
    length_penalty: float = Field(1.0, description="captioning: of beam search; without effect on one beam")
    meteor: bool | Literal["auto"] = Field(
        "auto", description="captioning: METEOR needs Java and 2 GB; auto computes it where Java is found"
    )
    spice_jars: MaybeSource = Field(
        None, description="captioning: folder of spice-1.0.jar and lib/ with Stanford CoreNLP; nothing is downloaded"
    )
    vqa: VqaConfig = VqaConfig()
    classification: ClassificationConfig = ClassificationConfig()
    matching: MatchingConfig = MatchingConfig()
    correspondence: CorrespondenceConfig = CorrespondenceConfig()
    seed: int = 0
    out: MaybeOutput = Field(None, description="folder for metrics.json, results.jsonl and rows.parquet")
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _one_data_set(self) -> EvaluateConfig:
        if (self.data is None) == (self.layout is None):
            raise ValueError("give either 'data', the URL of an indexed data set, or 'layout', a published one")
        if self.layout and (self.cache or self.captions):
            raise ValueError("'cache' and 'captions' belong to an indexed data set, and 'layout' names another kind")
        return self
