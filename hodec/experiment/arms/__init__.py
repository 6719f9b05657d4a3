"""A race of ways to train: arms, each at its best rate, over the same seeds, and what tells them apart."""
