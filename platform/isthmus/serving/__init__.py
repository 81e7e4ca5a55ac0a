"""The online service: OpenAI-compatible routes in front of batched model replicas, on Ray Serve."""
