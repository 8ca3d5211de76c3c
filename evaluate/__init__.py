"""Measure what a distilled student kept and what it gained."""
