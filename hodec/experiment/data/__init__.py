"""Data sets and their loaders; nothing here depends on a training framework.

``options`` holds the settings of each data set, without torch; ``images.build_data`` makes an ``ImageData`` of such an
option, and ``loaders.train_loader``, ``val_loader`` and ``test_loader`` make batches of that.
"""
