"""Base models, adapters, and what a model predicts or answers."""
