"""A compressed model as files that outlive this process."""
