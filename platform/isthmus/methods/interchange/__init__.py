"""Checkpoints of other code: LAVIS's and Hugging Face's into model folders, model folders into Hugging Face's."""

from isthmus.methods.interchange.describe import describe_folder
from isthmus.methods.interchange.from_hf import import_hf
from isthmus.methods.interchange.from_lavis import import_lavis_checkpoint
from isthmus.methods.interchange.to_hf import export_hf

__all__ = ["describe_folder", "export_hf", "import_hf", "import_lavis_checkpoint"]
