r"""Networks, diffusion and guidance."""
