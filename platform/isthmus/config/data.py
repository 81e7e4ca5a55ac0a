"""The section of a run's data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from isthmus.config.base import Config
from isthmus.config.fields import Fraction, MaybeSource, Positive
from isthmus.config.mixture import SetConfig, whole_weights


class DataConfig(Config):
    """Where the image-text pairs are and how images reach the trainer."""

    train: MaybeSource = Field(None, description="URL of an indexed data set (the folder that holds manifest.parquet)")
    mixture: tuple[SetConfig, ...] | None = Field(
        None, description="in place of 'train': several data sets, each with its share of the samples"
    )
    placement: Literal["inline", "streamed", "cached"] = Field(
        "inline",
        description="where frozen image features are computed: in the trainer, in a Ray Data stage, or beforehand",
    )
    cache: MaybeSource = Field(None, description="URL of the feature cache of 'train'; needed by placement 'cached'")
    captions: Literal["drawn", "first"] = Field(
        "drawn", description="a sample's caption in an epoch: one drawn from all that it has, or always its first"
    )
    shuffled_pairs: bool = Field(
        False,
        description="a control, not a way to train: every image gets the captions of another, the same one throughout, "
        "drawn by train.seed; the run and the model that it registers are marked as such",
    )
    augment: bool = Field(
        True,
        description="random crops and flips, drawn by (seed, sample, epoch); a cache holds the plain images' features "
        "whatever this says",
    )
    crop: tuple[Fraction, Fraction] = Field(
        (0.5, 1.0), description="smallest and largest share of an image's area that a random crop covers"
    )
    flip: bool = Field(
        True, description="mirror half of the images; false where captions tell left from right, or pictures hold text"
    )
    rand_augment: tuple[Positive, Annotated[int, Field(ge=1, le=10)]] | None = Field(
        None,
        description="RandAugment after crop and flip: number and magnitude (of 10) of its operations, e.g. [2, 7]; "
        "they change light, contrast and geometry; not for drawings of few colours, which equalising may recolour",
    )
    resize: Literal["torch", "pillow"] = Field(
        "torch",
        description="what resizes random crops; torch is several times as fast, within one level of 255 of pillow but "
        "for a crop's edges, where pillow sees the pixels around it",
    )
    shuffle_pool: Positive = Field(
        16384,
        description="samples mixed with one another at a time; a larger set is read in runs of neighbours, and the "
        "encoded images of a pool are held in memory, shared among the workers",
    )
    max_failed_share: Fraction = Field(0.01, description="a larger share of unreadable samples stops the run")
    max_cut_share: Fraction = Field(
        0.01, description="a larger share of captions that lose their end to max_length stops the run"
    )
    decode_workers: Positive = Field(1, description="Ray Data tasks that decode at once, per trainer")
    prefetch: Positive = Field(4, description="batches kept ready per trainer")

    @property
    def sets(self) -> tuple[SetConfig, ...]:
        """The data sets, one or several."""
        return self.mixture or (SetConfig(url=self.train or "", weight=1, cache=self.cache),)

    @property
    def where(self) -> str:
        """The data sets' URLs, for messages."""
        return ", ".join(one.url for one in self.sets)

    @model_validator(mode="after")
    def _one_form(self) -> DataConfig:
        if self.train is None and self.mixture is None:
            raise ValueError("no data is named: give 'train', the URL of a data set, or 'mixture', a list of several")
        if self.train is not None and self.mixture is not None:
            raise ValueError("'train' and 'mixture' are both given; leave one of them out (train: null)")
        return self

    @model_validator(mode="after")
    def _drawn_crops_are_seen(self) -> DataConfig:
        if not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(f"crop {list(self.crop)} is not two shares of the area above 0, the smaller first")
        if self.placement != "cached" and self.augment:
            return self
        why = "data.augment is false" if self.placement != "cached" else "a cache holds features of plain images"
        for name in ("crop", "flip", "rand_augment"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' has no effect, for {why}; leave it out")
        return self

    @model_validator(mode="after")
    def _a_mixture_mixes(self) -> DataConfig:
        if self.mixture is None:
            return self
        if len(self.mixture) < 2:
            raise ValueError("'mixture' has two data sets or more; name a single one in 'train'")
        if self.cache is not None:
            raise ValueError("'cache' is that of 'train'; in a mixture each data set names its own")
        urls = [one.url.rstrip("/") for one in self.mixture]
        if twice := next((url for url in urls if urls.count(url) > 1), None):
            raise ValueError(f"the data set {twice} is twice in 'mixture'; name it once, with the sum of its weights")
        whole_weights([one.weight for one in self.mixture])
        return self

    @model_validator(mode="after")
    def _cache_is_named(self) -> DataConfig:
        if self.placement == "cached" and not all(one.cache for one in self.sets):
            bare = next(one.url for one in self.sets if not one.cache)
            of_set = f" of {bare}" if self.mixture else ""
            raise ValueError(f"placement 'cached' needs 'cache'{of_set}, the URL that `isthmus data cache` wrote")
        return self
