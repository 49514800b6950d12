"""What a model has learned and what it does: memorization, log-probabilities, answers, intervals for few prompts."""
