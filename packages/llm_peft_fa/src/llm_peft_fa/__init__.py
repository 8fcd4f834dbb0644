"""Persian chat fine-tuning of small language models."""
