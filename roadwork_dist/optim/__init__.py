"""Floor 4: parameter groups, optimizers, schedules, EMA."""
