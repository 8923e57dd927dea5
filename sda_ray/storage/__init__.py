r"""Copies of run directories, on the head node and in a bucket."""
