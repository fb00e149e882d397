"""Images by index, with their labels and hashes."""
