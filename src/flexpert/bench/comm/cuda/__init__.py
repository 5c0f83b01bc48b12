"""`flexpert bench comm --device cuda`: our exchange on GPUs against its baselines.

baselines  what is measured: ours, NVIDIA's nixl_ep, torch on one rank
timing      CUDA graphs, a flushed L2, medians
rank        the tasks of one rank process
run         who is checked and timed when; the roofline
report      the figures as a table
"""
