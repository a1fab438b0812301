"""The methods end to end: post-training quantization and BCJR-QAT."""
