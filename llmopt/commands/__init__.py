"""The commands' bodies, imported when they run."""
