"""What log-probabilities of text have in common, whatever they are for: models, forward passes, records."""
