"""Child processes of the head: how they start, speak with it and end."""
