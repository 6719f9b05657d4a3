"""The report of a run: ``collect`` reads its folder, ``figures`` draws, ``render`` writes HTML and Markdown.

Nothing is imported here, so that naming ``hodec.experiment.report.sweep.SweepReport`` in a
Hydra config does not load matplotlib.
"""
