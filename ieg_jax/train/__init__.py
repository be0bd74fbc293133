"""Training: the loop, the step that it runs, and what is measured on the way."""
