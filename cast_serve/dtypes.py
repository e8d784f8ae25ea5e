"""config.json's name of a model's dtype -> bits a weight."""

DTYPE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
