"""BLIP-2 in the layout of Hugging Face's transformers: tensor names, image tower, tokenizer and files, both ways."""
