"""What goes in and out: models, texts, checkpoints."""
