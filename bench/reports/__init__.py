"""What is made of results: tables, plots, the sections of the documents, and the comparison with stored ratios."""
