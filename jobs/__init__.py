"""WHO ordered it: the command line, the specs of published numbers, the embedded default's training."""
