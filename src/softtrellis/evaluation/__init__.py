"""Scores of a model, comparisons between models, and the report of a run."""
