"""The one module whose import changes something: `import es_megatron.auto` at the head of a script patches Megatron-LM.

Without any `--es` flag on the command line the patched functions do what the originals do.
"""

from __future__ import annotations

from es_megatron.patching import patch_and_report

patch_and_report("megatron-lm")
