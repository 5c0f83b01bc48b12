"""Child processes by fork: a server that has imported what they need, and messages between them.

fork_server   the process that others are forked from
framing       messages on a byte stream
"""
