"""Isthmus joins a frozen vision model to a frozen language model with a small trainable bridge."""

__version__ = "0.1.0"
