"""``python -m evaluate sweep``: a family of budgets from training to one report."""
