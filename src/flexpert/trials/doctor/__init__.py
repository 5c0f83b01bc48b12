"""`flexpert doctor`: what this machine has, and what of flexpert will work on it."""
