"""python -m promoe"""

import sys

from promoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
