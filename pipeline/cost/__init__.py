"""What a spec or a training costs before anything is started."""
