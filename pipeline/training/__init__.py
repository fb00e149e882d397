"""Training of denoisers and base classifiers: settings, losses, the loop, and what it writes."""
