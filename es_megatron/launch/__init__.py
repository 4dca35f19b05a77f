"""Start a run on many hosts: `es-megatron launch`."""
