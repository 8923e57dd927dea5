r"""What a sweep will take, and whether a machine is fit for it."""
