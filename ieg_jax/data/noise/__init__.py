"""Label noise; `kinds` explains every kind, and is their registry."""
