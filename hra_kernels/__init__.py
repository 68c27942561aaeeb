"""Householder Reflection Adaptation at nearly the frozen layer's cost. See README.md."""

__version__ = "0.1.0"
