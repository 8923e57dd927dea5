r"""Ray: nodes, and the trials on them."""
