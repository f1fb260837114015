"""`python -m limoe_dist` is the `limoe` command; so is `torchrun -m limoe_dist train ...`."""

import sys

from launch.cli import main

sys.exit(main())
