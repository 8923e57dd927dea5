r"""Commands, and what people see in a terminal."""
