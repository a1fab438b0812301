"""Orthogonal transforms that make weights look Gaussian before they are quantized."""
