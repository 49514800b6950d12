"""The examples: datasets and prompt formats, held-out prompts with their checks, and what texts share."""
