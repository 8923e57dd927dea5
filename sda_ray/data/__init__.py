r"""The flow, and data sets of it."""
