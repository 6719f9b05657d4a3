"""``python -m hodec`` does what the ``hodec`` command does."""

import sys

from hodec.cli.main import main

sys.exit(main())
