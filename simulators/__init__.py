"""Simulators that evaluate.py opens by name."""
