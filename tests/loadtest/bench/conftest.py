"""The tiny random model, and text for it, that training's tests use."""

from tests.cast_train.conftest import llama_dir, text_file

__all__ = ["llama_dir", "text_file"]
