"""What the example programs share: contestants, tasks, one training loop, costs, alignment, reports and plots."""
