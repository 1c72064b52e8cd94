"""The latent cache: a folder of two Lance tables, the tokenizer and a note of what made it.

cache.json     what made it, with a fingerprint        clips.lance   latents, captions, sources
tokenizer/     the tokenizer                           text.lance    embeddings of a frozen text encoder
skipped.jsonl  clips that could not be used, and why
pairs.json     of clips that a teacher made: how it walked, and at which noise levels its states were kept
"""

from motionloom.data.cache.build import CacheReport, build_cache
from motionloom.data.cache.identity import Identity, decisive_keys
from motionloom.data.cache.progress import Progress
from motionloom.data.cache.reader import Cache, Row, open_cache
from motionloom.data.cache.text import TextTable, is_trained

__all__ = [
    "Cache",
    "CacheReport",
    "Identity",
    "Progress",
    "Row",
    "TextTable",
    "build_cache",
    "decisive_keys",
    "is_trained",
    "open_cache",
]
