"""The networks of f: denoisers, classifiers, their weights, and the device they run on."""
