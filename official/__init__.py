"""The official releases: their weights in, Hugging Face's layout out, LWM's image tokenizer."""
