"""A net, a data set, a rank rule and a method of one's own, for ``hodec train``."""
