"""Train, convert, retrain and report: ``python train.py [group=option] [key=value]``, see ``--help``."""

from hodec.experiment.main import main

if __name__ == "__main__":
    main()
