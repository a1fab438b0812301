"""Weight matrices to tiles, and tiles to codewords, hard and soft."""
