"""`flexpert bench comm`: our exchange against what else there is, in the same processes.

workload    sizes, routing and data; the float64 oracle
baseline   what every baseline does, and the list of them
ours, gloo, nixl_writes, memcpy
            the baselines; routes: the index work that the baselines share
ranks       real rank processes
run         who is checked and timed when
report, plot
            figures as a table and as a picture
cuda        the same on GPUs
"""
