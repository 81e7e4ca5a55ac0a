"""fit() in a process of its own, which a test can kill: ROOT NAME OPTIONS, the last as JSON for chaos_method.recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import chaos_method

from isthmus.methods import METHODS
from isthmus.training.driver import fit

if __name__ == "__main__":
    METHODS["chaos"] = chaos_method.SPEC
    options = json.loads(sys.argv[3])
    fit(chaos_method.recipe(Path(sys.argv[1]), sys.argv[2], **options), progress=False)
