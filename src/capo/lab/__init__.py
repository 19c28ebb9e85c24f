"""Runs, regimes, evaluation and reports."""
