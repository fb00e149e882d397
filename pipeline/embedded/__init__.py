"""The embedded defaults: test images and small trained weights, packed by jobs/pack_embedded.py."""
