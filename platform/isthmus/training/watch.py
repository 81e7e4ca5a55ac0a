"""What the driver shows of a training run: progress with time left, losses beside chance and floor, and events."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.config import RunConfig
from isthmus.progress import Tracker, progress

_EVERY_S = 0.5


class Watch:
    """Follows a spool actor from a thread of the driver for the length of a ``with`` block.

    Args:
        run: the recipe.
        spool: handle of the :class:`isthmus.training.metrics.Spool` actor.
        quarantine: file that gets a line per sample that could not be read.
        shown: False keeps the screen clean; events are still taken in.
    """

    def __init__(self, run: RunConfig, spool: Any, *, quarantine: Path, shown: bool) -> None:
        self.run, self.spool, self.quarantine, self.shown = run, spool, quarantine, shown
        self.facts: dict[str, dict[str, Any]] = {}
        self._references: dict[str, dict[str, float]] = {}
        self._over = threading.Event()
        self._step = 0
        self._stack = contextlib.ExitStack()
        self._tracker: Tracker | None = None

    def __enter__(self) -> Watch:
        self._open(f"start {self.run.name}", self.run.cluster.most_workers, "workers")
        self._thread = threading.Thread(target=self._follow, name="isthmus-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join(10.0)
        self._stack.close()
        self._tell_of_cut_captions()

    def references(self) -> dict[str, float]:
        """``loss_itc.chance`` and ``loss_itc.floor`` of every loss part."""
        return {f"{name}.{kind}": value for name, both in self._references.items() for kind, value in both.items()}

    def say(self, text: str) -> None:
        """One line on standard error."""
        print(text, file=sys.stderr, flush=True)

    def _follow(self) -> None:
        import ray

        over = False
        while not over:
            over = self._over.wait(_EVERY_S)
            try:
                events = ray.get(self.spool.events.remote(), timeout=10.0)
            except Exception:  # noqa: S112 - the cluster is busy or going down; only the block's end ends the watch
                continue
            for event in events:
                self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        self.facts[kind] = dict(event)
        if kind == "row":
            self._show_row(event)
        elif kind == "references":
            self._references = event["references"]
        elif kind == "unreadable":
            with self.quarantine.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: v for k, v in event.items() if k != "kind"}, default=str) + "\n")
        elif kind == "verdict":
            self.quarantine.with_name("freezing.txt").write_text(event["table"] + "\n", encoding="utf-8")
        elif kind == "skipped":
            self.say(f"A checkpoint was passed over: {event['reason']}")
        elif kind == "unwritten":
            self.say(f"The checkpoint of step {event['step']} was left out. {event['reason']}")
        elif kind == "resumed" and self.shown:
            self.say(f"Run '{self.run.name}' resumes at step {event['step']}.")
        elif kind == "start" and self._tracker is not None and self._tracker.unit == "workers":
            self._tracker.advance()
        elif kind == "stepping":
            # A bar of its own, so that neither starting nor the steps of an earlier try distort the time left.
            self._step = event["step"]
            self._open(f"train {self.run.name}", self.run.train.steps - self._step, "steps")

    def _tell_of_cut_captions(self) -> None:
        share = self.facts.get("row", {}).get("metrics", {}).get("captions_cut", 0.0)
        if share and self.shown:
            shown = "Less than 0.1%" if share < 0.001 else f"{share:.1%}"
            self.say(
                f"{shown} of the captions were longer than the recipe's max_length and lost their end. If that "
                "matters, raise it (method.text.max_length or method.language.max_length)."
            )

    def _open(self, label: str, total: int, unit: str) -> None:
        self._stack.close()
        if self.shown:
            self._tracker = self._stack.enter_context(progress(label, total=total, unit=unit))

    def _show_row(self, row: Mapping[str, Any]) -> None:
        self._advance(row["step"])
        if self._tracker is None:
            return
        values = row["metrics"]
        fields: dict[str, Any] = {}
        for name in (n for n in values if n == "loss" or n.startswith("loss_")):
            fields[name] = f"{values[name]:.3f}{self._beside(name)}"
        fields["images/s"] = f"{values['images_per_s']:.0f}"
        fields["data wait"] = f"{values['data_wait_share']:.0%}"
        self._tracker.update(**fields)

    def _beside(self, name: str) -> str:
        reference = self._references.get(name)
        return f" (chance {reference['chance']:.2f}, floor {reference['floor']:.2f})" if reference else ""

    def _advance(self, step: int) -> None:
        if self._tracker is not None and step > self._step:
            self._tracker.advance(step - self._step)
        self._step = max(step, self._step)
