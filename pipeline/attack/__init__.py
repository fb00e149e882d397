"""Adversarial images: search, proof, storage, and the gap to the certificates."""
