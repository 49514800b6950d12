"""Exports: GGUF files checked in llama.cpp, what each storage format keeps of a fine-tune, presets, model cards."""
