"""The commands of the ``isthmus`` command line, one small module for each family.

Nothing here imports torch, Ray, transformers or MLflow at import time: ``isthmus --help`` answers at once.
"""
