"""Real image-text sets that package registries carry, and drawn scenes where none can be reached."""

from isthmus.data.sources.driver import SCENES, SOURCES, fetch
from isthmus.data.sources.report import FetchReport, SourceReport

__all__ = ["SCENES", "SOURCES", "FetchReport", "SourceReport", "fetch"]
