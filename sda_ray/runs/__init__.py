r"""What a training leaves on disk and on W&B."""
