"""`python -m hvd_batchgrow.cli`."""

import sys

from hvd_batchgrow.cli import main

sys.exit(main())
