"""VTP: visual tokenizers that are pre-trained for generation (arXiv 2512.13687)."""

from motionloom.tokenizers.vtp.config import PRESETS, VTPConfig
from motionloom.tokenizers.vtp.model import VTPModel
from motionloom.tokenizers.vtp.tokenizer import VtpSettings, VtpTokenizer
from motionloom.tokenizers.vtp.towers import Features
from motionloom.tokenizers.vtp.words import Words

__all__ = ["PRESETS", "Features", "VTPConfig", "VTPModel", "VtpSettings", "VtpTokenizer", "Words"]
