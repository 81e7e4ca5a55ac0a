"""The online service: OpenAI-compatible routes in front of batched model replicas, on Ray Serve."""

from isthmus.ray_session import prepare

prepare()  # before the first import of Ray below
