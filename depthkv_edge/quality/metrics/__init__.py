"""What is reported: one metric, one file, from the records of a row to its numbers."""
