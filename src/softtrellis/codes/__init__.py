"""Codes: the functions from trellis states to reproduction values."""
