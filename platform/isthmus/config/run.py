"""The recipe of one training run."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from isthmus.config.base import Config, MethodConfig
from isthmus.config.data import DataConfig
from isthmus.config.fields import MaybeOutput, MaybeSource, Output
from isthmus.config.training import ClusterConfig, TrainConfig, ZeroConfig
from isthmus.errors import nearest


class TrackingConfig(Config):
    """MLflow. ``uri`` None means ``MLFLOW_TRACKING_URI``, and without that ``sqlite:///runs/mlflow.db``."""

    uri: MaybeOutput = None
    experiment: str = "isthmus"


def name_fault(name: str) -> str | None:
    """Why MLflow's registry, or ``models:/NAME@ALIAS``, cannot have a model of that name; None where they can."""
    if not name.strip() or name != name.strip() or re.search(r"[/:@'\"]", name):
        return f"'{name}' cannot name a registered model: it may hold none of / : @ and quotes, and no space around it"
    return None


def alias_fault(alias: str) -> str | None:
    """Why MLflow's registry cannot have that alias; None where it can."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", alias) or alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        return f"'{alias}' is no alias: letters, digits, - and _, and neither 'latest' nor a version as v1"
    return None


class RegisterConfig(Config):
    """Under which name and alias the trained model is registered."""

    name: str
    alias: str = "candidate"

    @field_validator("name")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if fault := name_fault(value):
            raise ValueError(fault)
        return value

    @field_validator("alias")
    @classmethod
    def _an_alias(cls, value: str) -> str:
        if fault := alias_fault(value):
            raise ValueError(fault)
        return value


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
        rows = self.train.global_batch // self.cluster.most_workers
        if rows < self.method.least_rows:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} is too small for cluster.workers "
                f"{self.cluster.most_workers}: each sets its own pairs against one another, which takes at least "
                f"{self.method.least_rows} of them"
            )
        return self
