"""Processes of a measurement, what they say to each other, and the store they meet through.

connection    whole messages over a socket pair
forks         starts processes, through fork_server, which has imported torch once
loopback      what libraries listen on
store         keys and values for the ranks of a run

Nothing listens and nothing has a name: who takes part was handed a socket. Messages are msgpack,
and each side decodes into the type that it expects.
"""
