"""Before a projector is trained: which encoders to join, and which pairs to learn from (Maniparambil et al. 2024)."""

from isthmus.ray_session import prepare

prepare()
