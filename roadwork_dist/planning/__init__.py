"""What training costs in memory, traffic and time, worked out on paper."""
