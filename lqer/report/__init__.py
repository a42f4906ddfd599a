"""What a finished run leaves for its reader: results.json, layers.csv, report.md and its figures."""
