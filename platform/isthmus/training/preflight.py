"""Everything about a run that can be found out in a second, before a worker starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus import storage
from isthmus.config import RunConfig, SetConfig, VisionConfig, load_run, to_yaml
from isthmus.config.differences import vision_differences
from isthmus.config.later import with_later_fields
from isthmus.contracts import Base, ModelVersion
from isthmus.errors import ConfigError, DataError, nearest
from isthmus.ray_session import joins_cluster
from isthmus.registry import check_tracking, manifest, resolve, tracking_uri
from isthmus.training.cost import COST

if TYPE_CHECKING:
    from isthmus.data.features import CacheMeta

log = logging.getLogger(__name__)

RECIPE, FINISHED = "recipe.yaml", "finished.json"
_OF_A_START = (
    RECIPE, "lineage.json", "metrics.jsonl", "metrics.sent", "mlflow-run.json", "quarantine.jsonl", COST
)  # fmt: skip
"""What a run leaves in its folder before its first checkpoint."""


@dataclass(frozen=True)
class Plan:
    """A run that has been checked.

    Attributes:
        run: the recipe with what it inherits from its parent filled in.
        spec: the method's entry of METHODS.
        samples: rows of the data's manifests.
        parent: the model to start from, fetched, or None.
        lineage: data, parent, code.
        digest: of all that decides the result.
        uri: MLflow's tracking URI.
        cached: the frozen encoder whose features are read from a cache instead of being computed by the workers.
        sizes: of the samples, those of each data set.
    """

    run: RunConfig
    spec: Any
    samples: int
    parent: ModelVersion | None
    lineage: Mapping[str, Any]
    digest: str
    uri: str
    cached: tuple[Base, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        return storage.join(self.run.storage, self.run.name)


def check(run: RunConfig) -> Plan:
    """Check ``run`` against the outside world, cheapest first, and fill in what it inherits.

    Raises:
        ConfigError: no such method, image encoder or packaged weights; a field that a run of this name may not change.
        StorageError: the run folder cannot be written.
        WeightsError: a path to weights that does not exist.
        DataError: no manifest or cache, or the data of this run name has changed.
        RegistryError: the tracking server is away, or the parent is not in the registry.
    """
    from isthmus.methods import METHODS

    if run.method.name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ConfigError(
            f"No method is called '{run.method.name}'.{nearest(run.method.name, METHODS)}", f"Known: {known}."
        )
    _check_rates(run)
    storage.ensure_writable(storage.join(run.storage, run.name))
    found = _data_facts(run)
    uri = tracking_uri(run.tracking)
    check_tracking(uri)
    parent = resolve(run.parent, run.tracking) if run.parent else None
    spec = METHODS[run.method.name]
    _check_weights(run)
    _check_vision(run)
    method = spec.survey(spec.resolve(run.method, _parent_recipe(parent)), [one.url for one in run.data.sets])
    resolved = run.model_copy(update={"method": method})
    data = manifest.data_record(run.data, found)
    lineage = manifest.lineage(data=data, parent=parent)
    cached = _cached_encoder(resolved, [digest for digest, _ in found], parent)
    sizes = tuple(samples for _, samples in found)
    digest = manifest.recipe_digest(resolved, lineage)
    plan = Plan(resolved, spec, sum(sizes), parent, lineage, digest, uri, cached, sizes)
    _check_same_run(plan)
    return plan


def write_recipe(plan: Plan) -> None:
    """The resolved recipe and the lineage into the run folder."""
    storage.write_bytes(storage.join(plan.folder, RECIPE), to_yaml(plan.run).encode())
    features = {"features": plan.cached[0].digest} if plan.cached else {}
    facts = json.dumps({**plan.lineage, **features}, indent=1)
    storage.write_bytes(storage.join(plan.folder, "lineage.json"), facts.encode())


def finished(plan: Plan) -> dict[str, Any] | None:
    """What an earlier fit of this very recipe left when it ended, or None."""
    facts = read_json(storage.join(plan.folder, FINISHED))
    return facts if facts and facts.get("digest") == plan.digest else None


def read_json(url: str) -> dict[str, Any] | None:
    """The object in a small JSON file; None where there is no such file or it was cut short."""
    if not storage.exists(url):
        return None
    try:
        value = json.loads(storage.read_bytes(url))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _check_rates(run: RunConfig) -> None:
    """Not a rule of the recipe itself: models that were trained so can still be read."""
    train = run.train
    if train.min_lr > train.lr:
        raise ConfigError(
            f"train.min_lr {train.min_lr:g} is above train.lr {train.lr:g}: the rate would rise to it.",
            "Lower train.min_lr as well.",
        )
    if train.warmup_steps >= train.steps > 1:
        log.warning(
            "train.warmup_steps %d is no less than train.steps %d: the learning rate never reaches train.lr.",
            train.warmup_steps, train.steps,
        )  # fmt: skip


def _check_vision(run: RunConfig) -> None:
    """The image encoder that the recipe itself names must be one; found here, not by workers after a minute."""
    vision = getattr(run.method, "vision", None)
    if vision is not None and run.data.placement != "cached":
        from isthmus.models.vision import describe_vision

        describe_vision(vision)


def _check_weights(run: RunConfig) -> None:
    """Catalogue names and local paths of every model that the recipe names.

    On a cluster a path is the workers' own affair: the machine that submits need not have it.
    """
    from isthmus.models import weights

    for field in type(run.method).model_fields:
        named = getattr(getattr(run.method, field), "weights", None)
        if not isinstance(named, str) or named in ("random", "timm") or named.startswith("hf:"):
            continue
        if named.startswith("pkg:"):
            weights.package(named)
        elif not joins_cluster():
            weights.resolve(named)


def _data_facts(run: RunConfig) -> list[tuple[str, int]]:
    """(digest, samples) of each data set."""
    from isthmus.data.manifest import Manifest

    facts: list[tuple[str, int]] = []
    for one in run.data.sets:
        found = Manifest.load(one.url)
        if len(found) == 0:
            raise DataError(f"{one.url} holds no samples.", "Index a folder that has image-text pairs.")
        facts.append((str(found.digest), len(found)))
    digests = [digest for digest, _ in facts]
    for number, digest in enumerate(digests):
        if (first := digests.index(digest)) < number:
            raise DataError(
                f"{run.data.sets[first].url} and {run.data.sets[number].url} hold the same data "
                f"(digest {digest[:12]}).",
                "Name it once in data.mixture, with the sum of its weights.",
            )
    return facts


def _cached_encoder(run: RunConfig, digests: Sequence[str], parent: ModelVersion | None) -> tuple[Base, ...]:
    """The encoder of the run's feature caches, which must be of this data and of the encoder that the recipe names."""
    if run.data.placement != "cached":
        return ()
    from isthmus.data.features import check_alike, read_meta

    metas = {str(one.cache): read_meta(str(one.cache)) for one in run.data.sets}
    for one, digest in zip(run.data.sets, digests, strict=True):
        _check_cache(run, one, metas[str(one.cache)], digest, parent)
    check_alike(metas)
    meta = metas[str(run.data.sets[0].cache)]
    return (Base("vision", VisionConfig(**meta.vision).weights, meta.encoder_digest),)


def _check_cache(run: RunConfig, data: SetConfig, meta: CacheMeta, digest: str, parent: ModelVersion | None) -> None:
    from isthmus.data.manifest import Manifest

    field = "data.mixture" if run.data.mixture else "data.cache"
    mend = f"Build a cache for this recipe in another folder with `isthmus data cache`, and name it in {field}."
    if meta.manifest_digest != digest and meta.manifest_digest not in Manifest.load(data.url, verify=False).digests:
        raise DataError(f"The feature cache {data.cache} was made of other data than {data.url}.", mend)
    wanted = getattr(run.method, "vision", None)
    if wanted is not None and (shown := vision_differences(VisionConfig(**meta.vision), wanted, ("cache", "recipe"))):
        raise DataError(
            f"The feature cache {data.cache} was made with another encoder than method.vision ({shown}).", mend
        )
    for base in _parent_bases(parent):
        if base["role"] == "vision" and base["digest"] != meta.encoder_digest:
            raise DataError(
                f"The feature cache {data.cache} was made with other weights than the parent's encoder.", mend
            )


def _parent_bases(parent: ModelVersion | None) -> list[dict[str, str]]:
    if parent is None:
        return []
    bases: list[dict[str, str]] = json.loads(Path(parent.path, "bases.json").read_text(encoding="utf-8"))
    return bases


def _parent_recipe(parent: ModelVersion | None) -> RunConfig | None:
    if parent is None:
        return None
    from isthmus.methods.artefact import read_recipe

    return read_recipe(parent.path)


def _check_same_run(plan: Plan) -> None:
    """A run folder belongs to one recipe: only steps may grow, and what does not touch the result may change.

    A run that has no checkpoint yet, perhaps because its recipe was wrong, is begun anew instead.
    """
    stored = storage.join(plan.folder, RECIPE)
    if not storage.exists(stored):
        return
    changes = manifest.changed_fields(_read_stored(stored), plan.run)
    before = read_json(storage.join(plan.folder, "lineage.json")) or {}
    for part, field in (("data", "digest"), ("parent", "version"), ("parent", "digest")):
        was, now = (before.get(part) or {}).get(field), (plan.lineage.get(part) or {}).get(field)
        kept = (part, field) != ("parent", "digest") or was is not None  # that of a folder has not always been kept
        if before and kept and was != now:
            changes.append(f"{part} {field}: was {was}{_mixed(before, part)}, is {now}{_mixed(plan.lineage, part)}")
    for base in plan.cached:
        was = before.get("features", base.digest)
        if was != base.digest:
            changes.append(f"weights of the encoder that made the features: were {was}, are {base.digest}")
    if changes and not any(storage.exists(storage.join(plan.folder, kept)) for kept in ("checkpoints", "artefact")):
        for name in _OF_A_START:
            storage.delete(storage.join(plan.folder, name))
    elif changes:
        raise ConfigError(
            f"The run '{plan.run.name}' in {plan.run.storage} was begun with another recipe: {'; '.join(changes)}.",
            "Give this run another name, restore those fields (train.steps may only grow), or delete the run's folder.",
        )


def _mixed(lineage: Mapping[str, Any], part: str) -> str:
    """The sets of a mixture with their weights, in brackets; nothing of what is no mixture."""
    shown = [f"{one['weight']} x {one['url']}" for one in (lineage.get(part) or {}).get("sets", ())]
    return f" ({', '.join(shown)})" if shown else ""


def _read_stored(url: str) -> RunConfig:
    import yaml

    from isthmus.methods import method_configs

    try:
        stored = yaml.safe_load(storage.read_bytes(url))
        values = with_later_fields(stored) if isinstance(stored, dict) else {}
        return load_run(None, methods=method_configs(), values=values)
    except (ConfigError, yaml.YAMLError, UnicodeDecodeError) as error:
        problem = error.problem if isinstance(error, ConfigError) else str(error).splitlines()[0]
        raise ConfigError(
            f"The stored recipe {url} cannot be read: {problem}", "Give this run another name."
        ) from error
