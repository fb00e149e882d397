"""Where files and runs live: folders, object stores, HTTPS, and this node's cache."""
