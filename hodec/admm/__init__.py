"""ADMM: train W with its loss, pull it towards a low-rank Z, and let U remember what they disagree on."""
