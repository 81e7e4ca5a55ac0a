"""Bulk captioning and embedding, exactly once, on Ray actors."""

from isthmus.ray_session import prepare

prepare()  # before the first import of Ray below
