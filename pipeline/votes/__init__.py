"""Votes in storage: the run, its orders, its blocks, and their seal."""
