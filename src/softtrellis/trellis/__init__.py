"""The bitshift trellis: Viterbi, BCJR and the packing of paths into bits."""
