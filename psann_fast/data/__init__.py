"""Text to training examples: tokenizers, packing, and `psannLMDataPrep`, which puts them together."""

from .corpus import default_corpus
from .dataprep import psannLMDataPrep
from .packing import IGNORED, Examples, pack
from .tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files, train_tokenizer

__all__ = [
    "IGNORED",
    "Examples",
    "Tokenizer",
    "default_corpus",
    "load_tokenizer",
    "pack",
    "psannLMDataPrep",
    "tokenizer_from_files",
    "train_tokenizer",
]
