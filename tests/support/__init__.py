"""What tests share: services, ranks, checkpoints, simulations."""
