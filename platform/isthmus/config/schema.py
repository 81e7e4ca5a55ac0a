"""The sections of a recipe. Defaults are the ones a run on one small machine wants; every field says its unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from isthmus.config.base import Config, MethodConfig
from isthmus.config.compression import TokenDropConfig
from isthmus.config.mixture import SetConfig, whole_weights
from isthmus.config.places import Place
from isthmus.errors import nearest

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Of a running mean."""
Precision = Literal["fp32", "bf16", "auto"]
Source = Annotated[str, Place()]
Output = Annotated[str, Place(written=True)]
MaybeOutput = Annotated[str | None, Place(written=True)]
MaybeSource = Annotated[str | None, Place()]


class VisionConfig(Config):
    """A frozen image encoder.

    ``name`` is any timm architecture that yields tokens or a feature map. ``weights`` is ``random`` (seeded),
    ``timm`` (the hub's pretrained weights of that name), ``pkg:NAME`` (a package of the weights catalogue), or a
    path to a ``.safetensors`` or ``.pth`` file.
    """

    name: str = "tf_efficientnet_lite0"
    weights: Source = "pkg:efficientnet-lite0"
    options: dict[str, bool | int | float | str] = Field(
        {}, description="keyword arguments of timm.create_model, for a variant of the architecture, e.g. {depth: 39}"
    )
    image_size: Positive | None = Field(None, description="pixels; the model's own size when not given")
    layer: int = Field(-2, description="which block's output is taken; -2 is the second last (BLIP-2), -1 the last")
    final_norm: bool = Field(False, description="apply the encoder's closing normalisation")
    pool: Literal["none", "mean"] = Field("none", description="mean: one averaged token instead of all")


class TextConfig(Config):
    """A BERT-family text encoder: tokenizer and, where widths allow, initial weights.

    ``weights`` is ``pkg:NAME``, a local directory in Hugging Face layout, or ``hf:ORG/NAME@REVISION``.
    """

    weights: Source = "pkg:all-minilm-l6-v2"
    max_length: Positive = Field(32, description="tokens, including [CLS] and [SEP]")


class LanguageConfig(Config):
    """A frozen language model, decoder-only or T5, in the same notation as :class:`TextConfig`."""

    weights: Source = "pkg:smollm2-135m-instruct"
    max_length: Positive = Field(32, description="tokens, including the end token; see max_length_of")
    max_length_of: Literal["caption", "text"] = Field(
        "caption",
        description="what a decoder-only model's max_length counts: the caption and its end token, or all of the text, "
        "with the begin-of-sequence token and the prompt before them (LAVIS). A T5's sides are each counted whole",
    )
    prompt: str = Field("", description="text between the soft prompt and the caption; takes no loss")
    keep_end: bool | None = Field(
        None,
        description="whether a caption that max_length cuts keeps its end token. Not given: as in LAVIS, where a "
        "decoder-only model's caption loses it and a T5's keeps it",
    )
    opening: Literal["text", "first"] = Field(
        "text",
        description="where the begin-of-sequence token stands: before the text, behind the soft prompt (LAVIS), or "
        "first of all, for a model that keeps its attention sink on it and is thrown off by anything else there",
    )
    dropout: bool = Field(False, description="True wakes the frozen model's dropout in training, as LAVIS does")
    prefix: Literal["drawn", "none"] = Field(
        "drawn",
        description="T5: whether the encoder reads a caption's first words, as many as are drawn for the sample and "
        "epoch, and the decoder predicts the rest (the paper); or the decoder predicts all (LAVIS)",
    )
    t5_activation: Literal["lavis", "checkpoint"] = Field(
        "lavis",
        description="FLAN-T5's gate: lavis is the exact GELU, which released BLIP-2 models were trained with; "
        "checkpoint is the language model's own, the approximation by tanh",
    )


class QFormerConfig(Config):
    """Shape of the Q-Former. The paper's is 12 layers of 768, 12 heads, 32 queries."""

    layers: Positive = 12
    width: Positive = 768
    heads: Positive = 12
    feed_forward: Positive = 3072
    queries: Positive = 32
    cross_every: Positive = Field(2, description="cross-attention in layers 0, n, 2n, ...")
    dropout: Fraction = 0.1
    embed: Positive = Field(256, description="width of the shared image-text space")
    text_pool: Literal["first", "mean"] = Field(
        "first",
        description="what stands for a text in ITC: its [CLS] token (the paper), or the mean of its tokens; that suits "
        "initial weights of a mean-pooled sentence encoder, whose lower layers leave [CLS] alike for all texts",
    )
    positions: Positive | None = Field(
        None, description="rows of the text branch's position table; those of the initial weights, or 512"
    )
    init: str | None = Field("text", description="'text': first layers of the text weights; null: random")
    compression: TokenDropConfig | None = Field(
        None, description="thin out the image tokens that the queries read, before all passes; None reads all"
    )
    init_segment: Literal["drop", "fold"] = Field(
        "drop",
        description="BERT adds its first segment row to every token; the Q-Former has no segments. drop: it is left "
        "out, as in LAVIS; fold: it moves into the positions, and the text branch starts as exactly the given model",
    )


class TowerConfig(Config):
    """The trained vision transformer that can drop tokens, on top of the frozen image encoder."""

    start: Literal["new", "vision"] = Field(
        "new",
        description="new: randomly started layers on the frozen encoder's tokens, of the sizes below; vision: the "
        "layers of method.vision behind its 'layer', with that model's weights and sizes",
    )
    layers: Positive = 4
    width: Positive = 384
    heads: Positive = 6
    feed_forward: Positive = 1536
    class_token: bool = Field(
        True, description="new: a class token in front; else the tokens' mean stands for the image"
    )
    dropout: Fraction = Field(0.1, description="new: of the embedded tokens")


class FusionConfig(Config):
    """A BERT cut in two: layers that read the text, and layers that fuse it with the image."""

    text_layers: Positive = 3
    fusion_layers: Positive = 3
    width: Positive = 384
    heads: Positive = 12
    feed_forward: Positive = 1536
    dropout: Fraction = 0.1
    embed: Positive = Field(256, description="width of the shared image-text space, for wholes and for tokens")
    text_pool: Literal["first", "mean"] = Field(
        "first", description="what stands for a text: its [CLS] token (ALBEF), or the mean of its tokens"
    )
    init: Literal["text"] | None = Field("text", description="'text': the layers of the text weights; null: random")


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


class TrainConfig(Config):
    """The optimisation: AdamW, linear warm-up, cosine per step."""

    steps: Positive
    global_batch: Positive = Field(64, description="pairs per optimizer step, over all workers")
    lr: Annotated[float, Field(gt=0)] = 1e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="factors of the learning rate by the beginning of parameter names, e.g. {qformer: 0.1}"
    )
    frozen: tuple[str, ...] = Field(
        (), description="parameters to leave as they are, by glob, e.g. ['qformer.words.*']; backbones always are"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = Field(
        1e-8,
        description="AdamW's epsilon: parameters whose gradients are smaller than it hardly move; 1e-6 keeps gradients "
        "that are mere rounding from being scaled up to whole steps",
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="global gradient norm; 0 clips nothing")
    precision: Precision = Field("auto", description="auto: bf16 where the hardware has it, else fp32")
    micro_batch: Positive | None = Field(
        None,
        description="rows of a worker whose activations are held at once; losses and gradients are those of the whole "
        "batch, contrast included, at the cost of a second forward pass. Not given: all rows",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute the activations of the Q-Former and of a frozen language model in the backward pass, "
        "layer by layer: less memory, more time",
    )
    seed: int = 0
    log_every: Positive = Field(10, description="steps between logged rows")
    checkpoint_every: Positive = Field(200, description="steps between checkpoints")
    sample_sheet: Annotated[int, Field(ge=0)] = Field(
        6,
        description="pairs of the last batch that are drawn, with the caption that the model gives, on a sheet among "
        "the run's artefacts; 0: none, and no image leaves for the tracking server",
    )
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that stay")
    keep_best: str | None = Field(
        None,
        description="a logged value, e.g. loss_itc: the checkpoint with its lowest mean since the one before stays too",
    )


def _number_or_range(value: Any) -> Any:
    """One number of workers, 0 for none beside the driver, or the fewest and the most."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, str) and value.isdecimal():
        numbers = [int(value)]
    if len(numbers) == 1 and type(numbers[0]) is int and numbers[0] == 0:
        return 0
    if len(numbers) > 2 or not all(type(n) is int and n > 0 for n in numbers) or numbers != sorted(numbers):
        raise ValueError("expected a whole number above 0, or two of them, [fewest, most]")
    return tuple(numbers) if len(numbers) == 2 else numbers[0]


Workers = Annotated[int | tuple[int, int], BeforeValidator(_number_or_range)]


class ClusterConfig(Config):
    """Ray resources of one run."""

    workers: Workers = Field(
        2,
        description="data-parallel training processes; [fewest, most] takes as many as the cluster has room for, and "
        "fewer or more as nodes go and come; 0 trains in this very process, with the result of one worker and without "
        "the time that one takes to start: for small runs, which nothing then restarts",
    )
    resize_every_s: Annotated[float, Field(gt=0)] = Field(
        60, description="with a range of workers: seconds between looks at whether there is room for more"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    encoders: Positive = Field(1, description="with data.placement 'streamed': encoding actors of each worker")
    cpus_per_encoder: Annotated[float, Field(gt=0)] = 1
    gpus_per_encoder: Annotated[float, Field(ge=0)] = 0
    encoder_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="custom Ray resources of an encoding actor, which lead it to the nodes that have them"
    )
    max_failures: Annotated[int, Field(ge=-1)] = Field(3, description="worker-group restarts; -1 is without end")

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while a run goes on."""
        return isinstance(self.workers, tuple)

    @property
    def in_process(self) -> bool:
        """Whether the driver's own process trains."""
        return self.workers == 0

    @property
    def most_workers(self) -> int:
        """The number of training processes, or the upper end of the range."""
        return self.workers[1] if isinstance(self.workers, tuple) else max(1, self.workers)


class ZeroConfig(Config):
    """DeepSpeed ZeRO."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none",
        description="cpu: the master copy of the trained parameters, AdamW's moments and its step are in the host's "
        "memory and on its processors; with stage 1, 2 or 3",
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        "none",
        description="cpu: each worker's share of all parameters, frozen ones included, is in the host's memory and is "
        "copied to the accelerator when it is used; with stage 3",
    )

    @model_validator(mode="after")
    def _something_to_offload(self) -> ZeroConfig:
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError(
                "zero.offload_optimizer 'cpu' needs zero.stage 1, 2 or 3: stage 0 is plain data parallelism, whose "
                "optimizer steps on the parameters where they are"
            )
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(
                f"zero.offload_parameters 'cpu' needs zero.stage 3: under stage {self.stage} every worker computes "
                "with whole parameters, which have to stay on its device"
            )
        return self


class TrackingConfig(Config):
    """MLflow. ``uri`` None means ``MLFLOW_TRACKING_URI``, and without that ``sqlite:///runs/mlflow.db``."""

    uri: MaybeOutput = None
    experiment: str = "isthmus"


class RegisterConfig(Config):
    """Under which name and alias the trained model is registered."""

    name: str
    alias: str = "candidate"


class RunConfig(Config):
    """One training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the same name resumes the same run")
    method: SerializeAsAny[MethodConfig]
    data: DataConfig
    train: TrainConfig
    parent: MaybeSource = Field(None, description="registered model this run starts from, models:/NAME@ALIAS")
    cluster: ClusterConfig = ClusterConfig()
    zero: ZeroConfig = ZeroConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: Output = Field("runs", description="local folder or URL; the run writes to <storage>/<name>")
    model: RegisterConfig | None = Field(None, description="what the trained model is registered as")

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any, info: ValidationInfo) -> Any:
        methods: dict[str, type[MethodConfig]] | None = (info.context or {}).get("methods")
        if isinstance(value, MethodConfig) or methods is None:
            return value
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError(f"expected a section with a 'name', one of: {', '.join(sorted(methods))}")
        if value["name"] not in methods:
            known = ", ".join(sorted(methods))
            raise ValueError(
                f"no method is called '{value['name']}'.{nearest(str(value['name']), methods)} Known: {known}"
            )
        return methods[value["name"]].model_validate(value)

    @model_validator(mode="after")
    def _whole_batches(self) -> RunConfig:
        # In between, an elastic run may have a number that does not divide, and pads its batches.
        most = self.cluster.most_workers
        if self.train.global_batch % most:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} does not divide among cluster.workers {most}"
            )
        return self

    @model_validator(mode="after")
    def _whole_parameters_in_parts(self) -> RunConfig:
        # ZeRO 3 frees a parameter behind each use, and the second forward pass of a part is such a use.
        if self.train.micro_batch is not None and self.zero.stage == 3:
            raise ValueError(
                "train.micro_batch does not go with zero.stage 3, which takes parameters apart between the passes; "
                "zero.stage 2 shards all but the parameters, and train.gradient_checkpointing works with both"
            )
        return self

    @model_validator(mode="after")
    def _enough_to_contrast(self) -> RunConfig:
        if self.train.global_batch < self.method.least_batch:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} is too small: {self.method.name} sets the pairs of a "
                f"batch against one another, which takes at least {self.method.least_batch}"
            )
        return self


class CaptionConfig(Config):
    """Bulk captioning of an image lake, exactly once."""

    model: Source
    data: Source = Field(description="URL of an indexed data set, of tars or of Parquet files")
    out: Output = Field(description="folder or URL for Parquet parts and commit records")
    chunk: Positive = Field(128, description="images per deterministic chunk, the unit that is committed")
    batch: Positive = Field(32, description="images per forward pass")
    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    prompt: str | None = Field(
        None, description="text between the soft prompt and the caption, '' for none; the recipe's own if not given"
    )
    max_new_tokens: Positive = 20
    min_new_tokens: Annotated[int, Field(ge=0)] = 1
    num_beams: Positive = 1
    max_failed_share: Fraction = 0.01
    cache: MaybeSource = Field(None, description="feature cache to read instead of encoding the images again")
    tracking: TrackingConfig = TrackingConfig()


class EmbedConfig(Config):
    """Bulk embeddings of images and texts."""

    model: Source
    data: Source
    out: Output
    images: bool = Field(True, description="vectors of images, or of clips")
    texts: bool = Field(True, description="vectors of captions; of sounds, where the model pairs those")
    chunk: Positive = 256
    batch: Positive = 64
    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    max_failed_share: Fraction = 0.01
    cache: MaybeSource = None
    tracking: TrackingConfig = TrackingConfig()


class ServeConfig(Config):
    """The online service. Unauthenticated access is refused unless bound to loopback with ``auth: none``."""

    models: Annotated[dict[str, str], Place()] = Field(description="served name -> models:/NAME@ALIAS")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    auth: Literal["token", "none"] = "token"
    token_env: str = Field("ISTHMUS_API_KEY", description="environment variable that holds the bearer token")
    replicas: Positive = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    max_batch: Positive = 8
    batch_wait_ms: Annotated[float, Field(ge=0)] = 10
    max_ongoing: Positive = 32
    max_queued: Positive = 64
    timeout_s: Annotated[float, Field(gt=0)] = 60
    max_body_mb: Annotated[float, Field(gt=0)] = 10
    max_pixels: Positive = Field(40_000_000, description="of an image or of a frame")
    max_seconds: Annotated[float, Field(gt=0)] = Field(60, description="of a sound or a clip")
    max_new_tokens: Positive = 64
    tracking: TrackingConfig = TrackingConfig()
