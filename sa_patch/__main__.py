"""``python -m sa_patch`` is the ``sa-patch`` command (``accelerate launch -m sa_patch`` too)."""

import sys

from sa_patch.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
