"""What operations cost: FLOPs, bytes and parameters of each, and their sum over a program."""
