"""Checks of a run: its files, and its votes by casting some of them again."""
