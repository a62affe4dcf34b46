"""Log-probabilities of options: tokens, what to share, forward passes; the way in is ``passes.score_options``."""
