"""Placement of experts by load, measured on loads that are made on the spot or were recorded."""
