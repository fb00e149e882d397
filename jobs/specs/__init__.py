"""One TOML per published number, and the embedded default (mnist*.toml)."""
