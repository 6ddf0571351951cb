"""Classification metrics and their confidence intervals."""
