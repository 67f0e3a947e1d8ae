"""Training of the learned weight: the soft mask that stands for pruning, and attention with a bias for every key."""
