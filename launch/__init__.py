"""Doors and wiring: the command line, and the only place that knows where things run."""
