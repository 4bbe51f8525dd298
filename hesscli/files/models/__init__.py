"""Model files, of every kind that people save."""
