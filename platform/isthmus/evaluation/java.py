"""The two caption scores that are Java programs: METEOR 1.5 and SPICE 1.0. Neither is downloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from isthmus import storage
from isthmus.errors import ConfigError

SPICE_JAR = "spice-1.0.jar"
SPICE_NEEDS = ("stanford-corenlp-*[0-9].jar", "stanford-corenlp-*-models.jar")
"""What lib/ beside the jar must hold and no Python package carries."""

Captions = Mapping[int, Sequence[str]]


class NotComputedError(Exception):
    """A score that this machine cannot compute; ``reason`` is one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def has_java() -> bool:
    """Whether there is a ``java`` on the path."""
    return shutil.which("java") is not None


def meteor(given: Captions, wanted: Captions) -> float:
    """METEOR of tokenised captions, by the jar inside pycocoevalcap.

    Raises:
        NotComputedError: no Java, or it does not run.
    """
    if not has_java():
        raise NotComputedError("METEOR needs Java, and there is no 'java' on the path")
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        value, _ = Meteor().compute_score(wanted, given)
    except (OSError, ValueError) as error:  # no memory for its heap, or a read-only or broken installation
        raise NotComputedError(f"METEOR does not run ({error}); it needs Java with 2 GB of memory") from error
    return float(value)


def check_spice(folder: str) -> Path:
    """The jar below ``folder``, with everything it needs beside it.

    Raises:
        ConfigError: no Java, or a file is missing.
    """
    root = storage.local_path(folder)
    missing = [SPICE_JAR] if not (root / SPICE_JAR).is_file() else []
    missing += [f"lib/{pattern}" for pattern in SPICE_NEEDS if not list((root / "lib").glob(pattern))]
    if missing:
        raise ConfigError(
            f"spice_jars: {folder} lacks {', '.join(missing)}.",
            "Put SPICE 1.0 and the Stanford CoreNLP 3.6.0 jars there, or leave spice_jars out.",
        )
    if not has_java():
        raise ConfigError("SPICE needs Java, and there is no 'java' on the path.", "Install it, or leave it out.")
    return root / SPICE_JAR


def spice(given: Captions, wanted: Captions, folder: str) -> float:
    """SPICE (F-score over scene graphs) of tokenised captions: mean over the images.

    Raises:
        ConfigError: see :func:`check_spice`.
        NotComputedError: the program fails.
    """
    jar = check_spice(folder)
    asked = [{"image_id": i, "test": given[i][0], "refs": list(wanted[i])} for i in sorted(wanted)]
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = ["java", "-jar", "-Xmx8G", str(jar), str(question), "-out", str(answer), "-subset", "-silent"]
        ran = subprocess.run(command, cwd=jar.parent, capture_output=True, text=True)
        if ran.returncode or not answer.is_file():
            said = (ran.stderr.strip() or ran.stdout.strip() or "no message").splitlines()[-1]
            raise NotComputedError(f"SPICE ended with status {ran.returncode}: {said}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    scores = {int(entry["image_id"]): entry["scores"]["All"]["f"] for entry in found}
    if set(scores) != set(wanted):
        raise NotComputedError(f"SPICE scored {len(scores)} of {len(wanted)} images")
    return sum(float(value) for value in scores.values()) / len(scores)
