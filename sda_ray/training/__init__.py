r"""The training loop, which knows no files."""
