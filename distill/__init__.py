"""Distil a causal language model under a compute budget."""

__version__ = "0.1.0"
