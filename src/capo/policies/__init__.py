"""Embedded policies and their recipes."""
