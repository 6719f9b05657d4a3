"""``python -m hodec.experiment`` does what ``hodec train`` and ``python train.py`` do."""

from hodec.experiment.main import main

main()
