"""A stored run and what came of its orders."""
