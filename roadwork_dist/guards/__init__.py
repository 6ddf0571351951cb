"""Floor 6: what keeps a run whole when the machine, the scheduler or a peer does not play along."""
