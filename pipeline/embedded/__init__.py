"""The embedded default: held-out MNIST images and small trained weights, made by jobs/train_embedded.py."""
