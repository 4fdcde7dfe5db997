"""The ``tilewright`` command, also as ``python -m tilewright``."""

import sys

try:
    from tilewright.cli import main
except KeyboardInterrupt:  # Ctrl-C while the command is imported
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
