"""What several scripts measure on and with: blocks, seconds, errors, watched processes."""
