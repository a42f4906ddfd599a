"""The quality of a model: perplexity under three named protocols, and tasks of lm-evaluation-harness."""
