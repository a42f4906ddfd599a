"""What several scripts measure on and with: blocks, texts, seconds, errors, watched processes."""
