"""What a file or folder is, what is in it, what is wrong: `python -m gaussian_tokenizer.inspect`."""
