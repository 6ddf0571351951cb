"""Floor 2: what training costs, worked out on paper."""
