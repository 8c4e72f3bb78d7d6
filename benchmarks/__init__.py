"""Measured comparisons with other systems, each one command."""
