"""Arms compared at equal cost over paired seeds: the quality benchmark behind `es-megatron compare`."""
