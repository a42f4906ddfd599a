"""What a model is worth: perplexity under three named protocols, and the tasks of lm-evaluation-harness."""
