"""Judges: whatever scores a completion, and abstains rather than guess."""
