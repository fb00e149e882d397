"""The embedded defaults: test images and small trained weights, made by jobs/train_embedded.py and pack_fashion.py."""
