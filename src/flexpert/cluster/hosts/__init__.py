"""Ranks that join from outside: `flexpert join` on any host that reaches the head.

cluster_token     the secret that all hosts share, and the keys that follow from it
agent_protocol    what agents and the head say to each other
curve_socket      ZeroMQ with CURVE on an asyncio loop
host_sessions     the head's side: who has joined, as which rank
agent             the other side: one rank, its process, and the way to the head
ready_file        what shows on its host that the rank serves
"""
