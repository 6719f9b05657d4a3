"""The cost of a model: parameters, multiply-adds and milliseconds."""
