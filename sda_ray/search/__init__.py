r"""What to try next, and the study that remembers it."""
