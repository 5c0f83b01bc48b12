"""Real services under change and harm: the demonstration, chaos, and the plans of an exchange."""
