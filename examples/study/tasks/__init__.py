"""What is learnt: a task has data, a pretrained model and a loss."""
