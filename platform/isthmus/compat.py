"""Remedies for libraries that do not fit together out of the box."""

from __future__ import annotations

import importlib
import sys
import threading

import torch

_LOCK = threading.Lock()
_MISSING_OPERATOR = "operator torchvision::"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A library's schemas live as long as the object that declared them.
_DECLARED: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Makes ``import torchvision`` work where its compiled operators do not fit the installed torch.

    A torchvision wheel that was built for CUDA cannot load its operator library beside a CPU-only torch. It swallows
    that failure and then trips over its own Python registrations, ``operator torchvision::nms does not exist``, which
    takes timm and transformers' image models with it. Isthmus uses torchvision's Python layer only, so on exactly that
    error the two schemas are declared by hand and the import is repeated. ``torchvision.ops.nms`` and
    ``torchvision.io`` stay unusable in that case.

    Call it before importing timm or transformers, in every process. Calling it again costs nothing. A torchvision that
    is absent or broken in another way is left for its importer to report.
    """
    with _LOCK:
        if "torchvision" in sys.modules or _DECLARED:
            return
        try:
            importlib.import_module("torchvision")
        except ImportError:
            return
        except RuntimeError as error:
            if _MISSING_OPERATOR not in str(error):
                raise
            _forget_partial_import()
            _declare_operators()
            importlib.import_module("torchvision")


def _forget_partial_import() -> None:
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _DECLARED.append(library)
