"""The embedded defaults: test images and small trained weights, packed by benchmarks/pack_embedded.py."""
