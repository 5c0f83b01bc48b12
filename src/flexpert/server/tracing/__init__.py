"""OpenTelemetry traces; imported only where the settings name a collector.

What a span is made of is known to the head: `cluster/sequence_trace.py` and the times of an
operation's phases. Spans are made of it when a request or an operation is over; ranks take no part.
"""
