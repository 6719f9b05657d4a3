"""One application of the library: Hydra settings, data sets, Lightning's Trainer, run folders, reports."""
