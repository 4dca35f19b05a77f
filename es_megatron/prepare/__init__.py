"""Text to tokens: `es-megatron prepare`."""
