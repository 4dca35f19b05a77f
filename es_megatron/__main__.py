"""`python -m es_megatron` is the `es-megatron` command."""

from __future__ import annotations

import sys

from es_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
