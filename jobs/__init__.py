"""WHO ordered it: the command line and the specs of published numbers."""
