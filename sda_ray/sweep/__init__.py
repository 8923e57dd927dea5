r"""One sweep, from its definition to a finished study."""
