"""WHAT is computed: the base classifier, its votes, their certificates. No Ray, no command line."""
