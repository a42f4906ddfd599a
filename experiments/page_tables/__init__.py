"""The parts of tables.py and row_picture.py."""
