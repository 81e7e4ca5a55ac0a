"""The sections of a run's optimisation, processes and sharding. Defaults are those of a run on one small machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from isthmus.config.base import Config
from isthmus.config.fields import Decay, Positive, Precision


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
