"""Experts in several formats of weights, side by side in one process."""
