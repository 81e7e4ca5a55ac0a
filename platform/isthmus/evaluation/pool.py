"""Where an evaluation's work is done: in this process, or in Ray actors that each hold the model.

Both give the parts of an order in its own order, and both refuse an answer in which rows are missing or doubled.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.config import EvaluateConfig
from isthmus.contracts import contrasts
from isthmus.data.parallel import store_environment
from isthmus.errors import DataError, IsthmusError
from isthmus.evaluation.model import Loaded
from isthmus.evaluation.sources import Source, open_source
from isthmus.evaluation.work import Order, Part, Worker, check, tokenizers
from isthmus.progress import progress

MAX_DEATHS = 3  # of one evaluation: then it is the machine

log = logging.getLogger(__name__)

Load = Callable[[], Loaded]
"""Loads the model in any process; picklable."""


@dataclass(frozen=True)
class About:
    """What is recorded of the model that did the work; ``prompt`` is its recipe's own; ``contrasts``: see Embeds."""

    uri: str
    tokenizers: str
    bases: tuple[str, ...] = ()
    prompt: str = ""
    contrasts: bool = True


def about(model: Loaded) -> About:
    """What is recorded of ``model``."""
    prompt = str(getattr(model.module, "own_prompt", ""))
    return About(model.uri, tokenizers(model), model.bases, prompt, contrasts(model.module))


class Runner(Protocol):
    """Does orders."""

    def about(self) -> About: ...

    def run(self, order: Order, label: str) -> Iterator[Part]:
        """The order's parts, in the order of its rows.

        Raises:
            DataError: rows missing or doubled in the answer.
        """
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [len(texts), E]."""
        ...


class Here:
    """This process."""

    def __init__(self, model: Loaded | None, source: Source, config: EvaluateConfig) -> None:
        if model is not None:
            check(model, config)
        self._worker, self._source, self._batch = Worker(model, source, config), source, config.batch

    def about(self) -> About:
        model = self._worker.model
        return about(model) if model else About("", "")

    def run(self, order: Order, label: str) -> Iterator[Part]:
        ids, start = [int(self._source.ids[row]) for row in order.rows], 0
        with progress(label, total=len(ids), unit="images") as tracker:
            for part in self._worker.run(order):
                group = ids[start : start + self._batch]
                accounted(group, [part])
                start += len(group)
                tracker.advance(len(group))
                yield part

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._worker.embed_texts(texts)


def accounted(wanted: Sequence[int], parts: Sequence[Part]) -> None:
    """Every wanted id once, as a row or as a failure.

    Raises:
        DataError: otherwise, with counts and the first id.
    """
    found = Counter(i for part in parts for i in [*part.ids, *(failure.id for failure in part.failures)])
    lost, more = Counter(wanted) - found, found - Counter(wanted)
    if lost or more:
        first = next(iter(lost or more))
        raise DataError(
            f"A worker gave {sum(found.values())} rows ({len(found)} ids) where {len(wanted)} were asked: "
            f"{sum(lost.values())} missing, {sum(more.values())} doubled or foreign (first id {first}).",
            "Nothing was scored. Is the data being written to? Index it again.",
        )


class Remote:
    """One Ray actor's process: the model and the data, opened once."""

    def __init__(self, load: Load, config: EvaluateConfig, digest: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.load, self.config, self.digest = load, config, digest

    def ready(self) -> About:
        """Opens both. Not done on construction, where Ray would turn any error into the actor's death."""
        if not torch.cuda.is_available():
            threads = os.environ.get("OMP_NUM_THREADS", "")  # Ray sets it to the CPUs it gave
            torch.set_num_threads(int(threads) if threads.isdigit() and int(threads) else 1)
        model = self.load()
        check(model, self.config)
        source = open_source(self.config, model.vision)
        if source.digest != self.digest:
            raise DataError(f"{source.root} is another data set in a worker than in the driver.", "Do not change it.")
        self.worker = Worker(model, source, self.config)
        return about(model)

    def run(self, order: Order) -> list[Part]:
        return list(self.worker.run(order))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self.worker.embed_texts(texts)


class Actors:
    """Ray actors. A call whose actor died is given to a new one.

    Args:
        load: makes the model inside each actor.
        source: the data, as the driver sees it.
        config: anchored; ``workers`` of at least 1.
    """

    GROUPS = 4
    """Batches in one call."""

    def __init__(self, load: Load, source: Source, config: EvaluateConfig) -> None:
        import ray

        self._ray, self._source, self._config, self._deaths = ray, source, config, 0
        kind: Any = ray.remote(Remote).options(
            num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker, max_restarts=0, max_task_retries=0
        )
        self._make = lambda: kind.remote(load, config, source.digest, store_environment())
        self._idle: list[Any] = []
        actors = [self._make() for _ in range(config.workers)]
        try:
            opened = [actor.ready.remote() for actor in actors]
            self._about: About = next(iter([self._get(answer) for answer in opened]))
        except BaseException as error:
            for actor in actors:
                ray.kill(actor)
            if isinstance(error, ray.exceptions.RayError):
                raise IsthmusError(
                    f"An evaluation worker died while it loaded the model: {error}",
                    "Give it more memory, or run fewer 'workers' on a machine.",
                ) from error
            raise
        self._idle = actors

    def about(self) -> About:
        return self._about

    def run(self, order: Order, label: str) -> Iterator[Part]:
        size = self.GROUPS * self._config.batch
        pieces = [
            replace(order, rows=order.rows[i : i + size], texts=order.texts[i : i + size])
            for i in range(0, len(order.rows), size)
        ]
        with progress(label, total=len(order.rows), unit="images") as tracker:
            for piece, parts in zip(pieces, self._map("run", pieces), strict=True):
                accounted([int(self._source.ids[row]) for row in piece.rows], parts)
                tracker.advance(len(piece.rows))
                yield from parts

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        size = self.GROUPS * self._config.batch
        return torch.cat(list(self._map("embed_texts", [texts[i : i + size] for i in range(0, len(texts), size)])))

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._idle:
            self._ray.kill(actor)
        self._idle = []

    def _map(self, method: str, items: Sequence[Any]) -> Iterator[Any]:
        """The method's answer to every item, in order, on whichever actor is free; few answers wait at once."""
        queue = deque(enumerate(items))
        busy: dict[Any, tuple[Any, int, Any]] = {}
        answers: dict[int, Any] = {}
        following = 0
        try:
            while following < len(items):
                while self._idle and queue and queue[0][0] < following + 4 * self._config.workers:
                    number, item = queue.popleft()
                    actor = self._idle.pop()
                    busy[getattr(actor, method).remote(item)] = (actor, number, item)
                done, _ = self._ray.wait(list(busy), num_returns=1)
                actor, number, item = busy.pop(done[0])
                try:
                    answers[number] = self._get(done[0])
                    self._idle.append(actor)
                except self._ray.exceptions.RayError as error:
                    self._ray.kill(actor)
                    queue.appendleft((number, item))
                    self._idle.append(self._replacement(error))
                while following in answers:
                    yield answers.pop(following)
                    following += 1
        finally:
            self._idle += [actor for actor, _, _ in busy.values()]

    def _replacement(self, error: Exception) -> Any:
        self._deaths += 1
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if self._deaths > MAX_DEATHS:
            raise IsthmusError(
                f"Evaluation workers died {self._deaths} times; the last reason was: {reason}",
                "Look at the machine's memory, and use a smaller 'batch' or fewer 'workers'.",
            ) from error
        log.warning("An evaluation worker died (time %d): %s", self._deaths, reason)
        actor = self._make()
        self._get(actor.ready.remote())
        return actor

    def _get(self, future: Any) -> Any:
        try:
            return self._ray.get(future)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, IsthmusError) else RuntimeError(str(error)) from error
