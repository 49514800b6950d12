"""Taking a fine-tune to where it is used: exports, GGUF files that answered, and whether it survives its storage."""
