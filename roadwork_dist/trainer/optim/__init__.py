"""Parameter groups, optimizers, schedules and the moving average."""
