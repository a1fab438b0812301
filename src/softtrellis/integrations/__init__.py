"""Other libraries' ways to load, run and fine-tune the quantized models."""
