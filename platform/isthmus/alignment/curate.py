"""A concept-balanced choice of a data set, as a Ray job (Maniparambil et al. 2024, section 3.2).

Actors score samples against the classes, chunk by chunk, and commit of each chunk the best candidates of each class;
what is committed is not done again. Here the candidates are merged, samples are handed out, and the choice is written
as a manifest over the same shards. Every sample of the data is accounted for: chosen, not chosen, or set aside as
unreadable.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.alignment.features import CaptionEncoder, cut_warning, text_facts
from isthmus.alignment.prototypes import Prototypes, model_space, text_space
from isthmus.alignment.topk import Assignment, Candidates, Collector, assign, best
from isthmus.alignment.vectors import Embedded, Encoded, Group, Stored, Vectors
from isthmus.config import CurateConfig, anchored
from isthmus.data.listing import HEADER_FILE
from isthmus.data.manifest import Manifest
from isthmus.data.parallel import map_ordered
from isthmus.data.subset import refuse_to_overwrite, write_subset
from isthmus.errors import DataError
from isthmus.inference.bulk import Resources, open_data, run_bulk
from isthmus.inference.commits import Job, Quarantined, digest_of, parquet_bytes
from isthmus.inference.loading import pick_device
from isthmus.inference.pool import Done
from isthmus.inference.rows import Rows

log = logging.getLogger(__name__)

TOP, WORK = "top", "work"
MERGED = 16  # tables that one task merges
CANDIDATE_BYTES = 16  # class, id and score
BEARABLE_BYTES = 100 * 2**30  # of candidates that are committed on the way, without a word
BLOCK = 1 << 20  # ids that are looked up at once
REPORT, CHOICE = "curation.json", "choice.parquet"


@dataclass(frozen=True)
class ClassRow:
    """What became of a class.

    Attributes:
        served: its place in the order in which classes were served.
        candidates: kept ones, at most ``top``.
        score_at_cut: the score that decides the order; None where it has fewer candidates.
        taken: samples, and the scores of the best and the last of them.
    """

    name: str
    served: int
    candidates: int
    score_at_cut: float | None
    taken: int
    best: float | None
    last: float | None


@dataclass(frozen=True)
class CurateReport:
    """The choice; ``samples == chosen + passed_over + no_candidate + unreadable`` always holds.

    Attributes:
        passed_over: candidates of classes that took others.
        no_candidate: samples among the kept candidates of no class.
        unreadable: set aside; ``work/quarantine.parquet`` has the reasons.
        full, short, empty: classes with ``per_class`` samples, with fewer, with none.
        digest: of the new data set.
        warnings: what the scores must not be taken for.
    """

    data: str
    out: str
    samples: int
    chosen: int
    passed_over: int
    no_candidate: int
    unreadable: int
    full: int
    short: int
    empty: int
    reused_chunks: int
    seconds: float
    digest: str
    classes: tuple[ClassRow, ...]
    warnings: tuple[str, ...] = ()


def curate(config: CurateConfig) -> CurateReport:
    """The choice that ``config`` describes, written to ``config.out``.

    Raises:
        DataError: prototypes and vectors of different models or widths, vectors of other data, ``out`` in use by
            another job, too many unreadable samples, or not one sample chosen.
        ConfigError, WeightsError: a sentence encoder that cannot be built.
    """
    started = time.monotonic()
    config = anchored(config)
    manifest, known = open_data(config.data), Prototypes.load(config.prototypes)
    embedded = Embedded.open(config.vectors, config.side) if config.vectors else None
    _check_space(config, known, embedded, manifest)
    _check_out(config.out, manifest)
    chunk = embedded.chunk if embedded else config.chunk
    cut = cut_warning(manifest, config.text, seed=0) if config.text is not None else None
    said = tuple(one for one in (cut, _space_warning(config, len(manifest), len(known.names), chunk)) if one)
    for one in said:
        log.warning(one)
    facts = {
        "manifest": manifest.digest,
        "prototypes": digest_of([known.names, known.vectors_KE.astype(float).tolist()]),
        "vectors": [embedded.model, embedded.side] if embedded else text_facts(config.text) if config.text else "",
        "chunk": chunk,
        **{name: getattr(config, name) for name in ("top", "nearest", "min_score")},
    }
    work = OpenCurateWork(config, known)
    give = Resources(config.actors, config.cpus_per_actor, config.gpus_per_actor, config.max_failed_share)
    folder = storage.join(config.out, WORK)
    done = run_bulk("scoring", Job("curate", facts), manifest, folder, chunk, work, give)
    found = _merged(storage.join(folder, TOP), config.top)
    made = assign(found, len(known.names), config.per_class, config.cut_rank or config.per_class)
    subset = _written(manifest, made, known, config.out)
    rows = class_rows(found, made, known)
    candidates = len(np.unique(found.id_C))
    report = CurateReport(
        data=config.data,
        out=config.out,
        samples=len(manifest),
        chosen=len(made.chosen.id_C),
        passed_over=candidates - len(made.chosen.id_C),
        no_candidate=done.done - candidates,
        unreadable=done.quarantined,
        full=sum(row.taken == config.per_class for row in rows),
        short=sum(0 < row.taken < config.per_class for row in rows),
        empty=sum(row.taken == 0 for row in rows),
        reused_chunks=done.skipped_chunks,
        seconds=round(time.monotonic() - started, 2),
        digest=subset.digest,
        classes=tuple(rows),
        warnings=said,
    )
    if report.chosen + report.passed_over + report.no_candidate + report.unreadable != len(manifest):
        raise DataError(f"The books of {config.out} do not balance.", "This is a fault of the program: report it.")
    storage.write_bytes(storage.join(config.out, REPORT), json.dumps(asdict(report), indent=1).encode())
    return report


def _check_space(config: CurateConfig, known: Prototypes, embedded: Embedded | None, manifest: Manifest) -> None:
    if embedded and embedded.manifest_digest != manifest.digest:
        raise DataError(f"{config.vectors} is of other data than {config.data}.", "Embed this data, or name the other.")
    wanted = model_space(embedded.model) if embedded else text_space(config.text) if config.text else ""
    if known.space and known.space != wanted:
        raise DataError(
            f"The prototypes in {config.prototypes} and the samples' vectors are of different models.",
            "Their cosines would mean nothing: make both with one model.",
        )


def _space_warning(config: CurateConfig, samples: int, classes: int, chunk: int) -> str | None:
    """A sentence where the candidates that are committed on the way may fill a disk: a chunk knows nothing of the
    others, so it keeps up to ``top`` of its samples for each class."""
    of_chunk = min(chunk * min(config.nearest or classes, classes), config.top * classes)
    most = samples / chunk * of_chunk * CANDIDATE_BYTES
    if most <= BEARABLE_BYTES or config.min_score is not None:
        return None
    return (
        f"Up to {most / 2**40:.1f} TiB of candidates may be kept in {storage.join(config.out, WORK)} while the data "
        "streams by, and are merged at the end. 'nearest' (say 10) or 'min_score' leaves most of them out."
    )


def _check_out(out: str, manifest: Manifest) -> None:
    """Refuses a folder that holds something else before anything is scored."""
    refuse_to_overwrite(out)
    if not storage.exists(storage.join(out, HEADER_FILE)):
        return
    origin = Manifest.load(out, verify=False).subset_of
    if origin != manifest.digest or not storage.exists(storage.join(out, WORK, "job.json")):
        raise DataError(f"{out} holds a data set that no curation of this data made.", "Choose another folder.")


@dataclass(frozen=True)
class OpenCurateWork:
    """Opens data and scorer inside an actor; picklable."""

    config: CurateConfig
    known: Prototypes

    def __call__(self) -> CurateWork:
        config, manifest = self.config, Manifest.load(self.config.data)
        source: Vectors
        if config.vectors:
            source = Stored(Embedded.open(config.vectors, config.side), manifest)
        else:
            assert config.text is not None
            device = pick_device(config.gpus_per_actor > 0)
            source = Encoded(CaptionEncoder(config.text, config.batch, device), manifest)
        return CurateWork(source, manifest, self.known, config)


class CurateWork:
    """Rows of the manifest -> each sample's nearest class, and the best candidates of each class."""

    def __init__(self, source: Vectors, manifest: Manifest, known: Prototypes, config: CurateConfig) -> None:
        self._source, self._known, self._config, self._rows = source, known, config, Rows(manifest)

    def process(self, rows: Sequence[int]) -> Done:
        """``parts``: id, class, score of each sample; ``top``: the candidates.

        Raises:
            DataError: vectors of another width than the prototypes, or not finite.
        """
        c, vectors_KE = self._config, self._known.vectors_KE
        collector = Collector(len(vectors_KE), c.top, c.nearest, c.min_score)
        ids, numbers, scores = list[int](), list[int](), list[float]()
        aside = list[Quarantined]()
        for group in self._source.read(rows):
            if not isinstance(group, Group):
                aside += group
                continue
            if group.vectors_ME.shape[1] != vectors_KE.shape[1]:
                raise DataError(
                    f"The samples' vectors have {group.vectors_ME.shape[1]} values, the prototypes' "
                    f"{vectors_KE.shape[1]}.",
                    "Make both with one model.",
                )
            for start in range(0, len(group.ids_B), c.batch):
                scores_BK = _slice(group, start, start + c.batch).scores(vectors_KE)
                ids_B = group.ids_B[start : start + c.batch]
                collector.add(ids_B, scores_BK)
                ids += ids_B.tolist()
                numbers += scores_BK.argmax(1).tolist()
                scores += scores_BK.max(1).tolist()
        self._rows.complete(rows, ids, aside)
        columns = {
            "id": pa.array(ids, pa.int64()),
            "class": pa.array([self._known.names[n] for n in numbers], pa.string()),
            "score": pa.array(scores, pa.float32()),
        }
        return Done(pa.table(columns), tuple(aside), {TOP: collector.result().table()})

    def blame(self, row: int, reason: str) -> Quarantined:
        """The quarantine entry of a row that was given up."""
        return self._rows.blame(row, reason)


def _slice(group: Group, start: int, stop: int) -> Group:
    starts = group.starts_B[start:stop]
    end = group.starts_B[stop] if stop < len(group.starts_B) else len(group.vectors_ME)
    return Group(group.ids_B[start:stop], group.vectors_ME[starts[0] : end], starts - starts[0])


def _merged(url: str, top: int) -> Candidates:
    """The best candidates of all chunks: groups of them by tasks, what those give here."""
    parts = [part for part, _ in storage.list_files(url, (".parquet",))]
    groups = [parts[start : start + MERGED] for start in range(0, len(parts), MERGED)]
    out = Candidates.none()
    for table in map_ordered(functools.partial(_merge, top=top), groups, label="Merging", unit="groups"):
        out = best([out, Candidates.of(table)], top)
    return out


def _merge(parts: Sequence[str], top: int) -> pa.Table:
    out = Candidates.none()
    for part in parts:
        out = best([out, Candidates.of(pq.read_table(pa.BufferReader(storage.read_bytes(part))))], top)
    return out.table()


def _written(manifest: Manifest, made: Assignment, known: Prototypes, out: str) -> Manifest:
    """The choice as a data set, and beside it which sample is of which class."""
    chosen = made.chosen
    if not len(chosen.id_C):
        raise DataError("Not one sample was chosen.", "Lower min_score, or look at the prototypes.")
    ids = np.sort(chosen.id_C)
    rows = [
        first + np.flatnonzero(np.isin(manifest.ids_of(range(first, min(first + BLOCK, len(manifest)))), ids))
        for first in range(0, len(manifest), BLOCK)
    ]
    starts = chosen.starts(len(known.names))
    rank = np.arange(len(chosen.id_C)) - starts[chosen.class_C]
    names = pa.array(known.names, pa.string()).take(pa.array(chosen.class_C))
    table = pa.table({"id": chosen.id_C, "class": names, "rank": rank, "score": chosen.score_C})
    storage.make_dirs(out)
    storage.write_bytes(storage.join(out, CHOICE), parquet_bytes(table))
    return write_subset(manifest, np.concatenate(rows), out)


def class_rows(found: Candidates, made: Assignment, known: Prototypes) -> list[ClassRow]:
    """A row for each class, in the order in which they were served."""
    classes = len(known.names)
    kept, taken = np.diff(found.starts(classes)), made.chosen.starts(classes)
    rows = []
    for place, number in enumerate(made.order_K.tolist()):
        scores = made.chosen.score_C[taken[number] : taken[number + 1]]
        cut = float(made.cut_K[number])
        rows.append(
            ClassRow(
                name=known.names[number],
                served=place + 1,
                candidates=int(kept[number]),
                score_at_cut=round(cut, 6) if math.isfinite(cut) else None,
                taken=len(scores),
                best=round(float(scores[0]), 6) if len(scores) else None,
                last=round(float(scores[-1]), 6) if len(scores) else None,
            )
        )
    return rows
