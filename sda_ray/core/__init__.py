r"""What everything stands on."""
