"""``python -m hodec.cli`` is the ``hodec`` command."""

import sys

from hodec.cli.main import main

sys.exit(main())
